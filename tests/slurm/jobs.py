"""Jobs on the cluster that tests/slurm/cluster.sh has started."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 150.0  # seconds for a job to start, or for ranks to come to a step, on a machine that does other things, too


def ask(*command: str) -> str:
    """What a command of SLURM prints."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


class Job:
    """A job that was submitted from the repository's root, or the task of an array."""

    def __init__(self, number: str, log: Path, folder: Path) -> None:
        self.number, self.log_file, self.folder = number, log, folder

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def facts(self) -> dict[str, str]:
        """What the controller says: JobState, Restarts, ExitCode, StdOut ..."""
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", "--oneliner", self.number)))

    @property
    def steps(self) -> list[int]:
        """The steps in the run's metrics.jsonl, or none."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row["step"] for row in found if row["kind"] == "train"]

    @property
    def saved(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("checkpoints/step-*"))

    @property
    def starts(self) -> list[dict]:
        """The lines of the run's job.jsonl."""
        file = self.folder / "job.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait(self, what: str, there: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Until `there()`; an error with the job's log after `seconds`."""
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, f"no {what} after {seconds} s\n{self.facts}\n{self.log}"
            time.sleep(0.2)

    def wait_for_steps(self, more: int) -> None:
        """Until training has done `more` steps, and saved, since its last start."""
        begun = self.starts[-1]["step"] if self.starts else 0
        self.wait(f"step {begun + more}", lambda: bool(self.steps) and self.steps[-1] >= begun + more)
        self.wait("checkpoint", lambda: bool(self.saved) and self.saved[-1] > begun)

    def wait_to_go_on(self, start: int) -> int:
        """Until ranks have started for the `start`th time, from a checkpoint, and the log says so; the step."""
        self.wait(f"start {start}", lambda: len(self.starts) >= start)
        step = self.starts[start - 1]["step"]
        self.wait("line in the log", lambda: f"resumed at step {step} from " in self.log)
        return step

    def wait_for_end(self) -> str:
        """The state in which the job has ended."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        self.wait("end", lambda: self.facts["JobState"] not in running)
        return self.facts["JobState"]
