"""A run that stands still says where: each rank writes its stacks, and what is known of the others, into its own log.

A thread looks at the clock; the main thread only says that a step, an evaluation or a save has ended. `faulthandler` writes the stacks
of all threads, also of those that are inside torch. It also writes them where the process dies of a signal such as SIGSEGV. Nothing is
ended here: a collective that takes longer than parallel.timeout_seconds does that (moe_train.parallel.watch), and one process may as
well be slow.
"""

import contextlib
import faulthandler
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from moe_train.parallel.mesh import World
from moe_train.parallel.watch import Watch

LOGS = "logs"


def log_of(folder: Path, rank: int) -> Path:
    """A rank's own log in the run folder; it is there where the rank has something to say."""
    return folder / LOGS / f"rank{rank}.txt"


class Watchdog:
    """Context manager around the steps of a run."""

    def __init__(self, folder: Path, world: World, watch: Watch, seconds: float) -> None:
        self.path, self.world, self.watch, self.seconds = log_of(folder, world.rank), world, watch, seconds
        self._last = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        faulthandler.enable(self._file)
        self.alive()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(2 * self.seconds)
        faulthandler.disable()
        with contextlib.suppress(OSError):  # a full disk; the error itself is what matters
            if error is not None:
                self._say(f"ended with {type(error).__name__}: {error}")
            self._file.close()
            if not self.path.stat().st_size:
                self.path.unlink()

    def alive(self) -> None:
        """Something has ended that takes time: the clock starts anew."""
        self._last = time.monotonic()

    def _run(self) -> None:
        reported = 0.0
        while not self._ended.wait(min(self.seconds / 4, 5.0)):
            last = self._last
            if time.monotonic() - last > self.seconds and last != reported:
                reported = last
                self._report(time.monotonic() - last)

    def _report(self, seconds: float) -> None:
        self._say(f"step {self.watch.step}: nothing has ended for {seconds:.1f} s; all ranks, then the stacks of this one:")
        for line in self.watch.everyone():
            self._say(f"    {line}")
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()

    def _say(self, text: str) -> None:
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  rank {self.world.rank}: {text}\n")
        self._file.flush()
