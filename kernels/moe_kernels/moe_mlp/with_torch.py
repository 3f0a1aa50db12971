"""moe_mlp on any device through torch's grouped GEMM and index ops; the signature is documented in reference.py."""

from torch import Tensor

from moe_kernels.checks import check_moe_mlp
from moe_kernels.grouped_mm.with_torch import rows_by_rows, rows_by_weights
from moe_kernels.moe_mlp.composed import Parts, compose
from moe_kernels.permutation.with_torch import copy_rows, sort_slots, sum_rows


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' SwiGLU MLPs: [T, D] -> [T, D]."""
    check_moe_mlp(x, w_gate_up, w_down, expert_ids, weights)
    return _op(x, w_gate_up, w_down, expert_ids, weights)[0]


_op = compose("torch", Parts(sort_slots, copy_rows, sum_rows, lambda offsets: offsets, rows_by_weights, rows_by_rows))
