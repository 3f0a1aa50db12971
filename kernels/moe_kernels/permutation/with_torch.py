"""The permutation ops on any device, out of torch's index ops; signatures are documented in reference.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.checks import check_expert_ids, check_permute, check_unpermute
from moe_kernels.permutation.op import define
from moe_kernels.types import Plan


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> Plan:
    """Group the slots by expert, stably. No value reaches the host."""
    check_expert_ids("sort_by_expert", expert_ids, num_experts)
    return Plan(*sort_slots(expert_ids, num_experts))


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token to the rows of its slots: [T, D] -> [M, D]."""
    check_permute(x, plan)
    return _ops.permute(x, *plan[:3])


def unpermute(rows: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    """Weighted sum of each token's rows, k = 0..K-1, in fp32: [M, D] -> [T, D]."""
    check_unpermute(rows, plan, weights)
    return _ops.unpermute(rows, *plan[:3], weights)


def sort_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets, row_slot, slot_row of a Plan. Rows at or after offsets[E] hold the empty slots here, so every row has a slot."""
    flat = expert_ids.reshape(-1)
    live = (flat >= 0) & (flat < num_experts)
    keys, order = torch.where(live, flat, num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets = torch.searchsorted(keys, bounds, out_int32=True)
    numbers = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
    slot_row = torch.empty_like(flat).scatter_(0, order, numbers)
    return offsets, order.int(), torch.where(live, slot_row, -1).view(expert_ids.shape)


def copy_rows(x: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    """rows[r] = x[row_slot[r] // K]."""
    return x.index_select(0, row_slot // slot_row.shape[1])


def sum_rows(rows: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over k in order of weights[t, k] * rows[slot_row[t, k]], accumulated in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type == "cpu":
        return _bags(rows.to(wide), slot_row, weights).to(rows.dtype)
    total = rows.new_zeros(slot_row.shape[0], rows.shape[1], dtype=wide)
    for k, picked in enumerate(_picked_rows(rows, slot_row)):
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked.to(wide), _live_weights(weights, slot_row)[:, k : k + 1].to(wide))
    return total.to(rows.dtype)


def split_rows(
    grad: Tensor, rows: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_rows: for rows, grad of the token times the slot's weight; for weights, grad . row."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    scale = _live_weights(weights, slot_row).reshape(-1).index_select(0, row_slot).to(wide)
    grad_rows = (copy_rows(grad, offsets, row_slot, slot_row).to(wide) * scale[:, None]).to(rows.dtype)
    dots = [(grad.to(wide) * picked.to(wide)).sum(-1) for picked in _picked_rows(rows, slot_row)]
    return grad_rows, torch.stack(dots, dim=1).to(weights.dtype)


def _bags(rows: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    """sum_rows in one pass over memory. Empty slots leave their bag, which needs values on the host: a CPU's are there."""
    live = slot_row >= 0
    counts = live.sum(1, dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    scale = None if weights is None else weights[live].to(rows.dtype)
    return F.embedding_bag(slot_row[live], rows, starts, mode="sum", per_sample_weights=scale)


def _picked_rows(rows: Tensor, slot_row: Tensor) -> list[Tensor]:
    """For each k the rows [T, D] of slot k, zero where it is empty."""
    # On a CPU looking at the values costs nothing and usually saves K passes; elsewhere it would be a sync.
    full = slot_row.device.type == "cpu" and bool((slot_row >= 0).all())
    columns = slot_row.unbind(1)
    if full:
        return [rows.index_select(0, column) for column in columns]
    return [torch.where(column[:, None] >= 0, rows.index_select(0, column.clamp(min=0)), 0) for column in columns]


def _live_weights(weights: Tensor, slot_row: Tensor) -> Tensor:
    return torch.where(slot_row >= 0, weights, 0)


_ops = define("torch", copy_rows, sum_rows, split_rows)
