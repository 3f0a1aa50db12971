"""Dropout by hashed numbers: every layout, recomputation and resume drops the same entries, which torch's generators would not.

Shapes: B rows, S positions, T = B * S tokens, K choices, F width of an expert, M rows of a plan: its K slots for each row that it was
given, which are T or a multiple of it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import Plan
from moe_train.model.routing import BatchInfo


def drop(x: Tensor, batch: BatchInfo, rate: float, layer: int, name: str) -> Tensor:
    """x [B, S, ...] with each entry 0 with probability `rate` and divided by 1 - `rate` otherwise (arXiv 1207.0580)."""
    if rate == 0:
        return x
    kept = batch.random(name, layer, math.prod(x.shape[2:])).view(x.shape) >= rate
    return torch.where(kept, x / (1 - rate), 0)


class ExpertDropout(NamedTuple):
    """Dropout of the experts' hidden units: each token's choices have numbers of their own."""

    batch: BatchInfo
    rate: float
    layer: int

    def __call__(self, hidden: Tensor, plan: Plan) -> Tensor:
        """hidden [M, F], sorted by expert -> [M, F]."""
        (slots, width), tokens = hidden.shape, self.batch.tokens.numel()
        uniform = self.batch.random("expert_dropout", self.layer, slots // tokens * width)
        uniform = uniform.view(tokens, -1, plan.top_k, width).transpose(0, 1).reshape(slots, width)
        # A row without a slot may have any number for one; nobody reads what becomes of it.
        kept = uniform[plan.row_slot.clamp(0, slots - 1)] >= self.rate
        return torch.where(kept, hidden / (1 - self.rate), 0)
