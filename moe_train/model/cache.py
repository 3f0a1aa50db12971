"""What decoding keeps of the tokens before: data that goes into a forward pass and comes out of it with the new tokens added.

Rows of different lengths end in the same column. The columns before a row's first token are padding, which is a document of its own,
as in packed rows: it is not attended to, and no router lets it change another document.

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


class Past(NamedTuple):
    """One layer's part of a cache; empty before the first tokens."""

    seen: Any = None  # keys, turned by their positions, and values, [B, P, G, d] each; transformer_xl: hidden rows [B, P, D]
    memory: Any = None  # the router's; its tensors are [B, ...]

    def extend(self, new: tuple[Tensor, ...]) -> Past:
        """With those of S more columns, [B, S, ...] each."""
        if self.seen is None:
            return self._replace(seen=new)
        return self._replace(seen=tuple(torch.cat(pair, 1) for pair in zip(self.seen, new, strict=True)))


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
        return replace(self, padding=self.padding[index], layers=tree_map_only(Tensor, lambda x: x[index], self.layers))
