"""The expert MLP out of grouped products, row copies and elementwise ops: what a backend supplies are the first two.

The backward is written out by hand: autograd would keep the gathered rows and both activations (27 KB instead of 10 KB per token at the
flagship shape) and would scatter gradients into zeroed buffers.

T tokens, K choices, E experts, D hidden, F expert hidden, M = T * K slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.moe_mlp.op import Backward, Forward, define


class Parts(NamedTuple):
    """What the MLP is made of. Rows at or after offsets[E] may hold anything, and row_slot there any number."""

    sort_slots: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # (expert_ids, E) -> offsets, row_slot, slot_row
    copy_rows: Callable[..., Tensor]  # (x [T, D], offsets, row_slot, slot_row) -> [M, D]
    sum_rows: Callable[..., Tensor]  # (rows [M, D], offsets, row_slot, slot_row, weights [T, K] | None) -> [T, D]
    groups: Callable[[Tensor], Any]  # offsets -> what the products take; once for each pass
    rows_by_weights: Callable[[Tensor, Tensor, Any], Tensor]  # ([M, C], [E, C, N], groups) -> [M, N]
    rows_by_rows: Callable[[Tensor, Tensor, Any], Tensor]  # ([M, N], [M, C], groups) -> [E, N, C]


def compose(backend: str, parts: Parts) -> Callable[..., Forward]:
    """Register `moe_kernels::moe_mlp_<backend>` made of `parts`."""

    def forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Forward:
        index = parts.sort_slots(expert_ids, w_down.shape[0])
        groups = parts.groups(index[0])
        z = parts.rows_by_weights(parts.copy_rows(x, *index), w_gate_up.mT, groups)
        gate, up = _halves(z)
        y = parts.rows_by_weights(F.silu(gate).mul_(up).to(x.dtype), w_down.mT, groups)
        return parts.sum_rows(y, *index, weights), z, *index

    def backward(
        grad: Tensor,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        weights: Tensor,
        z: Tensor,
        offsets: Tensor,
        row_slot: Tensor,
        slot_row: Tensor,
    ) -> Backward:
        index, groups = (offsets, row_slot, slot_row), parts.groups(offsets)
        gate, up = _halves(z)
        scale = weights.reshape(-1).index_select(0, row_slot.clamp(0, weights.numel() - 1))[:, None].to(gate.dtype)
        grad_rows = parts.copy_rows(grad, *index)
        grad_y = parts.rows_by_weights(grad_rows, w_down, groups).to(gate.dtype)  # before the routing weight
        silu = F.silu(gate)
        y = silu * up
        grad_weights = _by_slot(torch.linalg.vecdot(grad_y, y), slot_row).to(weights.dtype)
        grad_w_down = parts.rows_by_rows(grad_rows, y.mul_(scale).to(x.dtype), groups)
        grad_y.mul_(scale)
        grad_z = torch.empty_like(z)
        grad_gate, grad_up = grad_z.chunk(2, dim=-1)
        torch.mul(grad_y, silu, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_y.mul_(up), gate))
        grad_x = parts.sum_rows(parts.rows_by_weights(grad_z, w_gate_up, groups), *index, None)
        grad_w_gate_up = parts.rows_by_rows(grad_z, parts.copy_rows(x, *index), groups)
        return grad_x, grad_w_gate_up, grad_w_down, grad_weights

    return define(backend, forward, backward)


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, in fp32 (fp64 for fp64)."""
    gate, up = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, up


def _by_slot(values: Tensor, slot_row: Tensor) -> Tensor:
    """values [M] by row -> [T, K] by slot, zero for empty slots."""
    return torch.where(slot_row >= 0, values[slot_row.clamp(min=0).long()], 0)
