"""Which row of which source each sample of a run is: one source in an order of its own, or several blended by weight.

The next sample comes from the source that is furthest behind its share of the samples drawn with these weights (as Megatron-LM
blends). Each source goes through its own rows in its own order, with a cursor of its own: when weights or sources change at a resume,
the cursors stay, and no row comes twice before its source is used up.

Shapes: N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_train.data.indexed import Int64s
from moe_train.data.order import Lanes, Order
from moe_train.errors import UserError

MAX_SAMPLES = 2**48  # of a source in a run: sums of them stay far below 2**63, and its number fits above them
MAX_SOURCES = 2**14


@dataclass
class Source:
    """Rows of `seq_len` tokens from token `base` of a stream, and how far they were gone through."""

    base: int
    rows: int  # per epoch
    data: list[dict[str, Any]]  # what it is made of, for the state
    weight: float = 1.0
    cursor: int = 0  # samples since the start of the run
    taken: int = 0  # of them with the weights of now
    number: int = 0  # in the order in which the run met its sources

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells sources apart, wherever their files lie."""
        return tuple(entry["fingerprint"] for entry in self.data)


@dataclass
class Mixture:
    """The samples of a run. With `lanes` the rows are those of contiguous streams (order.py), without in a random order."""

    sources: list[Source]
    seq_len: int
    seed: int
    lanes: int | None = None
    left: list[dict[str, Any]] = field(default_factory=list)  # states of sources that the run had before

    def take(self, count: int) -> tuple[Int64s, Int64s]:
        """Return the next samples' global row numbers [N], none twice in a run, and where they start in the stream [N]."""
        picks = self._pick(count)
        rows, starts = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for i, source in enumerate(self.sources):
            at = np.flatnonzero(picks == i)
            found = self._rows(source, source.cursor, source.cursor + len(at))
            rows[at] = source.number * MAX_SAMPLES + found
            starts[at] = source.base + found % source.rows * self.seq_len
            source.cursor += len(at)
            source.taken += len(at)
        return rows, starts

    def _pick(self, count: int) -> Int64s:
        picks = np.zeros(count, dtype=np.int64)
        if len(self.sources) == 1:
            return picks
        weights = np.array([source.weight for source in self.sources])
        taken = np.array([source.taken for source in self.sources], dtype=np.int64)
        weights /= weights.sum()
        total = int(taken.sum())
        for j in range(count):
            picks[j] = i = int(np.argmax(weights * (total + j + 1) - taken))
            taken[i] += 1
        return picks

    def _rows(self, source: Source, first: int, last: int) -> Int64s:
        """Return epoch x rows + row of a source's samples [first, last)."""
        n = source.rows
        rows = [np.empty(0, dtype=np.int64)]
        while first < last:
            epoch, start = divmod(first, n)
            stop = min(n, start + last - first)
            order = Lanes(n, self.lanes) if self.lanes else Order(n, "rows", self.seed, epoch)
            rows.append(epoch * n + order(np.arange(start, stop)))
            first += stop - start
        return np.concatenate(rows)

    def state(self) -> list[dict[str, Any]]:
        """Return the places in all sources, as JSON types."""
        now = [
            {"data": s.data, "weight": s.weight, "cursor": s.cursor, "taken": s.taken, "number": s.number} for s in self.sources
        ]
        return now + self.left

    def load(self, saved: list[dict[str, Any]]) -> None:
        """Go to the places of `state`; sources and weights may have changed. Raises UserError for places that no run can have."""
        if not _are_places(saved):
            raise UserError(
                "the loader's state has no places in the sources that a run can have; start from another checkpoint"
            )
        known = {tuple(d["fingerprint"] for d in entry["data"]): entry for entry in saved}
        free = iter(range(max(entry["number"] for entry in saved) + 1, MAX_SOURCES))
        for source in self.sources:
            before = known.pop(source.identity, None)
            source.cursor = before["cursor"] if before else 0
            source.number = before["number"] if before else next(free)
        self.left = [entry | {"weight": 0.0, "taken": 0} for entry in known.values()]
        weights = {entry["number"]: entry["weight"] for entry in saved if entry["weight"]}
        same = weights == {source.number: source.weight for source in self.sources}
        taken = {entry["number"]: entry["taken"] for entry in saved}
        for source in self.sources:
            source.taken = taken[source.number] if same else 0


def check_weights(weights: Sequence[float], sources: int) -> None:
    """Raise UserError unless there is a positive weight for each source."""
    if len(weights) != sources or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"data.weights={list(weights)}: must be one positive number for each of {sources} entries of data.train"
        )


def _are_places(saved: Any) -> bool:
    if not isinstance(saved, list) or not saved or not all(isinstance(entry, dict) for entry in saved):
        return False
    return all(_is_place(entry) for entry in saved) and len({entry["number"] for entry in saved}) == len(saved)


def _is_place(entry: dict[str, Any]) -> bool:
    limits = {"cursor": MAX_SAMPLES, "taken": MAX_SAMPLES, "number": MAX_SOURCES - 1}
    if not all(type(entry.get(key)) is int and 0 <= entry[key] <= limit for key, limit in limits.items()):
        return False
    weight, data = entry.get("weight"), entry.get("data")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
        return False
    return isinstance(data, list) and all(isinstance(d, dict) and isinstance(d.get("fingerprint"), str) for d in data)
