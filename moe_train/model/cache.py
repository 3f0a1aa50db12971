"""What decoding keeps of the tokens before: data that goes into a forward pass and comes out of it with the new tokens added.

Rows of different lengths end in the same column. The columns before a row's first token are padding, which is a document of its own,
as in packed rows: it is not attended to, and no router lets it change another document.

A token costs no copy of the columns before it: there is room behind them, into which the first cache that goes on writes.

Shapes: B rows, P columns kept, S new columns, G key and value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moe_train.model.attention import find_segments
from moe_train.model.routing import BatchInfo, Segments

STEP = 256  # columns of which a room's length is a multiple


class Room:
    """Memory for more columns than there are yet. The caches that go on from one another share it."""

    def __init__(self, seen: tuple[Tensor, ...], more: int) -> None:
        self.used = seen[0].shape[1]
        self.length = -(-(self.used + more) // STEP) * STEP
        self.tensors = tuple(x.new_empty(len(x), self.length, *x.shape[2:]) for x in seen)
        for room, x in zip(self.tensors, seen, strict=True):
            room[:, : self.used] = x

    def add(self, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All columns, with the new ones written behind those that are there."""
        start, self.used = self.used, self.used + new[0].shape[1]
        for room, x in zip(self.tensors, new, strict=True):
            room[:, start : self.used] = x
        return tuple(room[:, : self.used] for room in self.tensors)


class Past(NamedTuple):
    """One layer's part of a cache; empty before the first tokens."""

    seen: Any = None  # keys, turned by their positions, and values, [B, P, G, d] each; transformer_xl: hidden rows [B, P, D]
    memory: Any = None  # the router's; its tensors are [B, ...]
    room: Room | None = None  # whose first P columns are `seen`

    def extend(self, new: tuple[Tensor, ...]) -> Past:
        """With those of S more columns, [B, S, ...] each. This one stays as it is, whatever else goes on from it."""
        if self.seen is None:
            return self._replace(seen=new)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # autograd and graphs want tensors that nobody writes to
            return Past(tuple(torch.cat(pair, 1) for pair in zip(self.seen, new, strict=True)), self.memory)
        room, kept, more = self.room, self.seen[0].shape[1], new[0].shape[1]
        if room is None or room.used != kept or kept + more > room.length:  # none, another cache has gone on in it, or full
            room = Room(self.seen, more)
        return self._replace(seen=room.add(new), room=room)

    def take(self, index: Tensor) -> Past:
        """Of the rows at `index` alone."""
        return Past(*tree_map_only(Tensor, lambda x: x[index], (self.seen, self.memory)))


@dataclass(frozen=True)
class Cache:
    """Everything that decoding keeps of some rows. `Cache(padding)` is the start."""

    padding: Tensor  # [B] int64, columns before each row's first token
    length: int = 0  # P
    layers: dict[str, Past] = field(default_factory=dict)  # by layer name
    label: int = 0  # of the rows' documents

    def batch(self, tokens: Tensor, dtype: torch.dtype) -> BatchInfo:
        """The batch that puts tokens [B, S] int64 after what is kept, for a model that computes in `dtype`."""
        rows, new = tokens.shape
        columns = torch.arange(self.length + new, device=tokens.device)
        doc_ids = (columns >= self.padding[:, None]) & (self.padding[:, None] > 0)
        positions = torch.where(doc_ids, columns - self.padding[:, None], columns)
        if self.length == 0:
            segments = find_segments(doc_ids.cpu(), tokens.device, dtype)
        else:
            later = columns > columns[-new:, None]
            segments = Segments(mask=((doc_ids[:, -new:, None] == doc_ids[:, None]) & ~later)[:, None])
        return BatchInfo(
            tokens=tokens,
            positions=positions[:, -new:],
            doc_ids=doc_ids[:, -new:].long(),
            labels=torch.full_like(tokens, self.label),
            rows=torch.arange(rows, device=tokens.device),
            segments=segments,
        )

    def extend(self, columns: int, layers: dict[str, Past]) -> Cache:
        """With so many more columns, which are in `layers` already."""
        return replace(self, length=self.length + columns, layers=layers)

    def take(self, rows: list[int]) -> Cache:
        """Of these rows alone, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.padding.device)
        return replace(self, padding=self.padding[index], layers={name: past.take(index) for name, past in self.layers.items()})
