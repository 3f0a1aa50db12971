"""Signals: SIGTERM or SIGINT asks a run to finish the step, save and exit, and a SIGINT after that ends it at once; SIGUSR1 saves.

SIGTERM may come twice for one request: SLURM sends it to every process of a step, and torchrun, which is one of them, hands it on.
"""

import enum
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNAL = signal.SIGUSR1


class Request(enum.IntEnum):
    """What a run is asked to do after a step; the largest wins."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


def agreed(votes: Sequence[float]) -> Request:
    """What any rank was asked, from the sum of all votes: signals do not arrive at one time, and all ranks have to do the same."""
    save, stop = votes
    return Request.STOP if stop else Request.SAVE if save else Request.NOTHING


class StopRequest:
    """Context manager that remembers signals instead of dying of them, but for a SIGINT after one that asks to stop."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that asks this rank to end
        self.save = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        self._before_save = signal.signal(SAVE_SIGNAL, self._remember_save)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        signal.signal(SAVE_SIGNAL, self._before_save)

    def votes(self) -> list[float]:
        """What this rank was asked, to be summed over ranks for `agreed`: [save, stop]. Saving is asked for once."""
        save, self.save = self.save, False
        return [float(save), float(self.name is not None)]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def _remember_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
