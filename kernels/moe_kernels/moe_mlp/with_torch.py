"""moe_mlp on any device through torch's grouped GEMM and index ops; the signature is documented in reference.py.

The backward is written out by hand: autograd would keep the gathered rows and both activations (27 KB instead of 10 KB per token at the
flagship shape) and would scatter gradients into zeroed buffers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.checks import check_moe_mlp
from moe_kernels.grouped_mm.with_torch import rows_by_rows, rows_by_weights
from moe_kernels.moe_mlp.op import Backward, Forward, define
from moe_kernels.permutation.with_torch import copy_rows, sort_slots, sum_rows


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' SwiGLU MLPs: [T, D] -> [T, D]."""
    check_moe_mlp(x, w_gate_up, w_down, expert_ids, weights)
    return _op(x, w_gate_up, w_down, expert_ids, weights)[0]


def _forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Forward:
    index = sort_slots(expert_ids, w_down.shape[0])
    offsets = index[0]
    z = rows_by_weights(copy_rows(x, *index), w_gate_up.mT, offsets)
    gate, up = _halves(z)
    y = rows_by_weights(F.silu(gate).mul_(up).to(x.dtype), w_down.mT, offsets)
    return sum_rows(y, *index, weights), z, *index


def _backward(
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
    index = (offsets, row_slot, slot_row)
    gate, up = _halves(z)
    scale = weights.reshape(-1).index_select(0, row_slot)[:, None].to(gate.dtype)
    grad_rows = copy_rows(grad, *index)
    grad_y = rows_by_weights(grad_rows, w_down, offsets).to(gate.dtype)  # before the routing weight
    silu = F.silu(gate)
    y = silu * up
    grad_weights = _by_slot(torch.linalg.vecdot(grad_y, y), slot_row).to(weights.dtype)
    grad_w_down = rows_by_rows(grad_rows, y.mul_(scale).to(x.dtype), offsets)
    grad_y.mul_(scale)
    grad_z = torch.empty_like(z)
    grad_gate, grad_up = grad_z.chunk(2, dim=-1)
    torch.mul(grad_y, silu, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_y.mul_(up), gate))
    grad_x = sum_rows(rows_by_weights(grad_z, w_gate_up, offsets), *index, None)
    grad_w_gate_up = rows_by_rows(grad_z, copy_rows(x, *index), offsets)
    return grad_x, grad_w_gate_up, grad_w_down, grad_weights


def _halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, in fp32 (fp64 for fp64)."""
    gate, up = z.to(torch.promote_types(z.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, up


def _by_slot(values: Tensor, slot_row: Tensor) -> Tensor:
    """values [M] by row -> [T, K] by slot, zero for empty slots."""
    return torch.where(slot_row >= 0, values[slot_row.clamp(min=0).long()], 0)


_op = define("torch", _forward, _backward)
