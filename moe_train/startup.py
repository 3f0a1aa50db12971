"""Where the time goes before the first step."""

import os
import time
from pathlib import Path


class Startup:
    """Seconds by phase since this process began, or the torchrun that started it. Create it when everything is imported."""

    def __init__(self) -> None:
        # The torchrun of a worker that was started again is as old as the run.
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        launched = _age(os.getppid()) if first else 0.0
        self.marks = [("torchrun", max(launched - _age(os.getpid()), 0.0)), ("imports", _age(os.getpid()))]
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What ran since the mark before was `phase`."""
        now = time.perf_counter()
        self.marks.append((phase, now - self.last))
        self.last = now

    def describe(self) -> str:
        """All phases in one line."""
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.marks if phase != "torchrun" or seconds)
        return f"ready after {sum(seconds for _, seconds in self.marks):.1f} s: {parts}"


def _age(process: int) -> float:
    """Seconds since a process began; 0 where the system does not tell (other than Linux)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
