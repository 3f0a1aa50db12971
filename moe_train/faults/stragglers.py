"""Which rank the others wait for.

Ranks that work together take the same time for a step, whoever is slow. What differs is how long each works and how long it waits. A
thread looks at the main thread's stack fifty times a second: a sample whose innermost frame is torch.distributed's is waiting (or packs
what is sent). The rest of the step's time is the rank's own work: kernels, data, Python, and any sleep in between.

On CUDA the host runs ahead of the device, and its stack says nothing of what that waits for; ranks are not timed there.
"""

import statistics
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from moe_train.parallel.mesh import World

PERIOD = 0.02  # seconds between samples
LEAST = 0.1  # seconds of a step; a smaller difference is nobody's fault
WRAPPERS = ("torch/_ops.py", "torch/utils/_contextlib.py", "torch/_compile.py", "threading.py")


class Stragglers:
    """Enter it around each step; `row` compares the ranks. Closes with `close`."""

    def __init__(self, world: World, factor: float | None) -> None:
        self.world, self.factor = world, factor
        self.timed = factor is not None and world.size > 1 and world.device.type == "cpu"
        self._main = threading.get_ident()
        self._working = self._ended = False
        self._samples = self._waiting = self._steps = 0
        self._seconds = self._start = 0.0
        self._suspect: int | None = None  # the rank that was too slow in the row before
        if self.timed:
            threading.Thread(target=self._run, name="stragglers", daemon=True).start()

    def __enter__(self) -> Self:
        self._start, self._working = time.perf_counter(), True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._working = False
        self._seconds += time.perf_counter() - self._start
        self._steps += 1

    def row(self) -> dict[str, Any]:
        """slowest_rank, slowest_seconds and others_seconds of the steps since the last call; all ranks call it together."""
        if not self.timed:
            return {}
        share = 1 - self._waiting / max(self._samples, 1)
        mine = torch.tensor([self._seconds * share / max(self._steps, 1)], dtype=torch.float64)
        self._samples = self._waiting = self._steps = 0
        self._seconds = 0.0
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        seconds = [float(value) for value in everyone]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {
            "slowest_rank": slowest,
            "slowest_seconds": seconds[slowest],
            "others_seconds": statistics.median(value for rank, value in enumerate(seconds) if rank != slowest),
        }

    def complaint(self, row: dict[str, Any]) -> str | None:
        """What to say of a row, if anything: a rank is named that was too slow in the row before, too."""
        if not row or self.factor is None:
            return None
        slow, others, before = row["slowest_seconds"], row["others_seconds"], self._suspect
        self._suspect = row["slowest_rank"] if slow > self.factor * others and slow - others > LEAST else None
        if self._suspect is None or self._suspect != before:
            return None
        limit = f"faults.straggler_factor={self.factor:g}"
        return f"warning: rank {row['slowest_rank']} works {slow:.2f} s of a step, the median of the others {others:.2f} s ({limit})"

    def close(self) -> None:
        """End the thread."""
        self._ended = True

    def _run(self) -> None:
        while not self._ended:
            time.sleep(PERIOD)
            if self._working:
                self._samples += 1
                self._waiting += is_waiting(sys._current_frames().get(self._main))


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a stack ends inside torch.distributed: in a collective, or in the wait for one."""
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    return frame is not None and "torch/distributed/" in frame.f_code.co_filename
