"""Ending a run early: SIGTERM or SIGINT asks it to finish the step, save and exit; a second signal ends it at once."""

import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from moe_train.parallel.mesh import World

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that remembers the first signal instead of dying of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.name: str | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them, for signals do not arrive at one time."""
        asked = torch.tensor(self.name is not None, dtype=torch.int32, device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
