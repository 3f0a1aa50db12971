"""Naive twin of the permutation ops, in any float dtype, and their documentation.

T tokens, K choices, E experts, D width, M = T * K slots; slot number t * K + k.

Cost at the flagship shape (T = 16,384, K = 4, E = 16, D = 1,280, bf16), each tensor moved once, at 2.04 / 3.35 / 4.8 TB/s of
A100 / H100 / H200:

| op | FLOPs | bytes | A100 | H100 | H200 |
| --- | --- | --- | --- | --- | --- |
| sort_by_expert | 0 | 12 TK + 4 TK = 1.05 MB | 0.5 us | 0.3 us | 0.2 us |
| permute | 0 | 2 TD + 2 TKD = 210 MB | 103 us | 63 us | 44 us |
| unpermute | 2 TKD = 0.17 GFLOP | 2 TKD + 2 TD = 210 MB | 103 us | 63 us | 44 us |
| unpermute backward | 4 TKD = 0.34 GFLOP | 4 TKD + 2 TD = 378 MB | 185 us | 113 us | 79 us |
"""

import torch
from torch import Tensor

from moe_kernels.checks import check_expert_ids, check_permute, check_unpermute
from moe_kernels.types import Plan


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> Plan:
    """Group the slots by expert, stably: rows of one expert stay in slot order, equal to a stable argsort.

    expert_ids [T, K] int32 in [-1, E), where -1 marks an empty slot; T = 0 is fine. Returns a Plan: `offsets` [E + 1], `row_slot` [M]
    (only the first offsets[E] entries mean anything), `slot_row` [T, K] (-1 for an empty slot), all int32.
    Raises KernelError for another dtype or shape, for T * K above 2^30, and in debug mode for an id out of range.
    """
    check_expert_ids("sort_by_expert", expert_ids, num_experts)
    flat = expert_ids.flatten().tolist()
    order = [slot for expert in range(num_experts) for slot, chosen in enumerate(flat) if chosen == expert]
    slot_row = [-1] * len(flat)
    for row, slot in enumerate(order):
        slot_row[slot] = row
    counts = [flat.count(expert) for expert in range(num_experts)]
    offsets = [sum(counts[:expert]) for expert in range(num_experts + 1)]
    row_slot = order + [-1] * (len(flat) - len(order))
    index = [torch.tensor(v, dtype=torch.int32, device=expert_ids.device) for v in (offsets, row_slot, slot_row)]
    return Plan(index[0], index[1], index[2].view(expert_ids.shape))


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token to the rows of its slots: rows[r] = x[row_slot[r] // K]; x [T, D] -> rows [M, D].

    Rows at or after offsets[E] are undefined (zero here). The gradient of x[t] is the sum over its slots, k = 0..K-1, in fp32.
    Raises KernelError where x is not a contiguous float [T, D] on the plan's device.
    """
    check_permute(x, plan)
    live = int(plan.offsets[-1])
    tokens = torch.tensor([slot // plan.top_k for slot in plan.row_slot[:live].tolist()], dtype=torch.int64, device=x.device)
    return torch.cat([x[tokens], x.new_zeros(plan.row_slot.shape[0] - live, x.shape[1])])


def unpermute(rows: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    """Sum each token's rows: out[t] = sum over k = 0..K-1, in this order, of weights[t, k] * rows[slot_row[t, k]].

    rows [M, D], weights [T, K] float of any float dtype (None: all ones) -> [T, D] in rows' dtype. Products and sums are fp32 (fp64 for
    fp64 rows) and rounded once; an empty slot adds nothing, whatever its weight. Differentiable in rows and weights.
    Raises KernelError for shapes that differ from the plan's, other dtypes, or a non-contiguous argument.
    """
    check_unpermute(rows, plan, weights)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(plan.slot_row.shape[0], rows.shape[1], dtype=wide)
    for k, column in enumerate(plan.slot_row.unbind(1)):
        (token,) = (column >= 0).nonzero(as_tuple=True)
        term = rows[column[token].long()].to(wide)
        if weights is not None:
            term = term * weights[token, k, None].to(wide)
        total = total.index_put((token,), total[token] + term)
    return total.to(rows.dtype)
