"""Runs that torchrun starts, as people do."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from launches import ROOT


class Torchrun:
    """torchrun in a process group of its own, whose output goes to a file."""

    def __init__(self, log: Path, *options: str, words: list[str], script: str = "launch/pretrain.py") -> None:
        self.log = log
        call = [sys.executable, "-m", "torch.distributed.run", *options, script, *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                call, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        found = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def wait_for(self, pattern: str, after: int = 0, seconds: float = 120.0) -> re.Match[str]:
        end = time.monotonic() + seconds
        while (found := re.compile(pattern, re.MULTILINE).search(self.said, after)) is None:
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < end, self.said[-3000:]
            time.sleep(0.02)
        return found

    def tree(self) -> list[int]:
        """torchrun and every process below it."""
        parents = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split("\n")
        pairs = [tuple(map(int, line.split())) for line in parents if line]
        found = [self.process.pid]
        for pid in found:  # it grows
            found += [child for child, parent in pairs if parent == pid]
        return found

    def kill(self) -> None:
        """End torchrun and its workers at once, as a node does that loses power."""
        for pid in [*self.workers(), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
