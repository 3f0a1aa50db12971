"""Context parallelism: the ranks of `cp` share out the positions of each row; only attention looks across them.

`gather`: a rank has some queries and gathers all keys and values. Positions are dealt in 2 cp chunks, of which rank r holds r and
2 cp - 1 - r (zigzag), so that causal attention costs each rank the same. The kernel learns which keys each query sees
(`moe_train.model.attention_kernels`).
`ulysses` (arXiv 2309.14509): an all-to-all gives each rank whole rows of some heads, and back; positions are dealt in order.

Shapes: B rows, S positions, S_context positions of this rank, H query heads, G key and value heads, d head width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.model.attention import Attend, Attention
from moe_train.model.decoder import Decoder
from moe_train.model.routing import Segments, Sharing
from moe_train.parallel.collectives import all_gather, all_reduce, all_to_all
from moe_train.parallel.mesh import Layout


def deal(length: int, ranks: int, method: str) -> Tensor:
    """The positions of a row of `length` that each rank holds: [ranks, length / ranks] int64."""
    if method == "ulysses" or ranks == 1:
        return torch.arange(length).view(ranks, -1)
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], 1)


def share_rows(layout: Layout, length: int, method: str, device: torch.device) -> Sharing | None:
    """Which positions of rows of `length` each of the ranks that share them holds; None where a rank holds whole rows."""
    cp, tp = layout.size("cp"), layout.size("tp")
    if cp * tp == 1:
        return None
    dealt = deal(length, cp, method).to(device)
    rank = layout.at("cp") * tp + layout.at("tp")
    group = layout.sharers
    return Sharing(
        rank, dealt.view(cp * tp, -1), dealt[layout.at("cp")], lambda x: all_reduce(x, group), lambda x: all_gather(x, 1, group)
    )


def apply_context(model: Decoder, group: dist.ProcessGroup, method: str) -> None:
    """Let the attention of `model` work over the ranks of `group`, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            inner = module.attend
            module.attend = GatheredAttention(group, inner) if method == "gather" else UlyssesAttention(group, inner)


class GatheredAttention:
    """Own queries against everyone's keys and values."""

    def __init__(self, group: dist.ProcessGroup, attend: Attend) -> None:
        self.group, self.attend = group, attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """q [B, S_context, H, d], k and v [B, S_context, G, d] -> [B, S_context, H, d]."""
        assert segments is not None  # the engine says what this rank's queries see
        both = all_gather(torch.stack([k, v]), 2, self.group)
        order = deal(both.shape[2], self.group.size(), "gather").flatten().argsort()
        k, v = both[:, :, order.to(both.device)].unbind()
        return self.attend(q, k, v, segments)


class UlyssesAttention:
    """Whole rows of some heads."""

    def __init__(self, group: dist.ProcessGroup, attend: Attend) -> None:
        self.group, self.attend = group, attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """q [B, S_context, H, d], k and v [B, S_context, G, d] -> [B, S_context, H, d]."""
        out = self.attend(self._heads(q), self._heads(k), self._heads(v), segments)
        parts = out.unflatten(1, (self.group.size(), -1)).movedim(1, 0)  # [cp, B, S_context, H / cp, d]
        return self._exchange(parts).movedim(0, 2).flatten(2, 3)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S_context, H, d] -> [B, S, H / cp, d]."""
        parts = x.unflatten(2, (self.group.size(), -1)).movedim(2, 0)  # [cp, B, S_context, H / cp, d]
        return self._exchange(parts).movedim(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """parts[i] goes to rank i."""
        flat = parts.contiguous().flatten(0, 1)
        size = [parts.shape[1]] * self.group.size()
        return all_to_all(flat, size, size, self.group).view_as(parts)
