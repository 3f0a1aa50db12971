"""Which rank it was: when a collective fails, the ranks that are left say who gave no sign, at which step, and where.

A thread of each rank writes a line into the process group's store every few seconds: a count, the step, and what the main thread
does (read from its stack). Nothing else happens until a collective fails; the main thread only sets `step`. Then each rank that is
left reads all lines twice. A rank whose count has not moved was killed or stopped; one that has ended says with what; one that goes
on without having failed is named with the place where it is.

Under gloo a failure is an exception. Under NCCL the watchdog ends the process itself, after naming the collective in its own words;
what is said here then depends on whether the exception comes first.
"""

import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from moe_train.parallel.mesh import World
from moe_train.patience import within

PACKAGE = str(Path(__file__).parents[1])
LONGEST_WAIT = 5.0  # seconds for an answer of the store, whose holder may be the one that is gone


class RankFailure(RuntimeError):
    """A collective failed because of another rank."""


class Sign(NamedTuple):
    """What a rank has written last."""

    beats: int
    step: int
    place: str
    state: str  # running, failed (in a collective), or what it ended with


class Watch:
    """Context manager around the steps of a run; the trainer sets `step`. A failed collective leaves it as RankFailure."""

    def __init__(self, world: World, timeout_seconds: float) -> None:
        self.world, self.timeout = world, timeout_seconds
        # A run that is started again waits for the report, so that signs are frequent where they are few.
        self.interval = min(2.0, 1.0 + world.size / 1000, timeout_seconds / 10)
        self.step = 0
        self._beats, self._state, self._main = 0, "running", threading.get_ident()
        self._ended = threading.Event()
        self._store: Any = None

    def __enter__(self) -> Self:
        if self.world.size > 1:
            # A connection of its own: on one, a `get` that waits in another thread holds up everything else.
            self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            self._write()
            threading.Thread(target=self._beat, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._store is None:
            return
        if error is not None and _is_collective(error):
            self._state = "failed"
            explained = self._explain(error)
            self._ended.set()
            raise RankFailure(explained) from error
        self._ended.set()
        self._state = "done" if error is None else f"ended with {type(error).__name__}"
        within(LONGEST_WAIT, self._write)

    def everyone(self) -> list[str]:
        """What each rank has written last, a line for each; empty where there are no others, or they cannot be asked."""
        signs = within(LONGEST_WAIT, self._exchange) if self._store is not None else None
        return [
            f"rank {rank}: {sign.state}, at step {sign.step} in {sign.place} (sign {sign.beats})"
            for rank, sign in sorted((signs or {}).items())
        ]

    def _beat(self) -> None:
        while not self._ended.wait(self.interval):
            self._write()

    def _write(self) -> None:
        self._beats += 1
        frame = sys._current_frames().get(self._main)
        place = _place((f for f, _ in walk_stack(frame))) if frame is not None else ""
        sign = Sign(self._beats, self.step, place, self._state)
        try:
            self._store.set(str(self.world.rank), json.dumps(sign))
        except RuntimeError:  # the store has gone with its holder; whoever waits for it finds out
            self._ended.set()

    def _exchange(self) -> dict[int, Sign]:
        """Write, and read what every rank has written; a rank that has not come so far is missing."""
        self._write()
        there = [str(rank) for rank in range(self.world.size)]
        if not self._store.check(there):
            there = [rank for rank in there if self._store.check([rank])]
        lines = self._store.multi_get(there)  # at once: a thousand ranks that each ask a thousand times would wait too long
        return {int(rank): Sign(*json.loads(line)) for rank, line in zip(there, lines, strict=True)}

    def _explain(self, error: BaseException) -> str:
        start, after = time.monotonic(), None
        if (before := within(LONGEST_WAIT, self._exchange)) is not None:
            time.sleep(3 * self.interval)
            after = within(LONGEST_WAIT, self._exchange)
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        what = f"step {self.step}: {_place(reversed(frames))} failed on rank {self.world.rank}: {' '.join(str(error).split())}"
        if before is None or after is None:
            who = "the store does not answer: the process that holds it (torchrun, or rank 0) has ended or hangs"
        else:
            who = (
                "; ".join(self._blame(before, after, time.monotonic() - start))
                or "unknown, for every rank gives signs and failed likewise"
            )
        return f"{what}. Cause: {who} (parallel.timeout_seconds={self.timeout:g}). The same command goes on from the last checkpoint"

    def _blame(self, before: dict[int, Sign], after: dict[int, Sign], seconds: float) -> Iterable[str]:
        """What is to be said of other ranks: of those that are gone, if there are any, else of those that did not fail."""
        others = {rank: after.get(rank) for rank in range(self.world.size) if rank != self.world.rank}
        gone, elsewhere = [], []
        for rank, sign in others.items():
            if sign is None:
                gone.append(f"rank {rank} has not begun")
            elif sign.state not in ("running", "failed"):
                gone.append(f"rank {rank} has {sign.state}" if sign.state != "done" else f"rank {rank} is done")
            elif sign.state == "running" and rank in before and before[rank].beats == sign.beats:
                last = f"last seen at step {sign.step} in {sign.place}"
                gone.append(f"rank {rank} gave no sign for {seconds:.1f} s, {last}; it was killed or stopped")
            elif sign.state == "running":
                elsewhere.append(f"rank {rank} goes on, at step {sign.step} in {sign.place}")
        return gone or elsewhere


def _is_collective(error: BaseException) -> bool:
    """Whether it comes from a process group: torch has no one type for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _place(inner_first: Iterable[FrameType]) -> str:
    """What a stack does: the collective, if it is in one, and the innermost place in this package."""
    called, where = "", ""
    for frame in inner_first:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.endswith("distributed_c10d.py") and not name.startswith("_"):
            called = name
        elif path.startswith(PACKAGE) and path != __file__:
            where = f"{name} ({Path(path).name}:{frame.f_lineno})"
            break
        elif not called and "torch/distributed" in path and name not in ("wrapper", "inner", "fn"):
            called = name  # where no collective's name is on the stack: the wait for one that runs in the background
    return f"{called} called by {where}" if called and where else called or where or "torch"
