"""moe_mlp through MegaBlocks' grouped GEMM, on our row copies; the signature is documented in reference.py.

Its own layers save the gathered rows and both halves of the pre-activation (28 KB per token at the flagship shape, here 10 KB).
"""

from torch import Tensor

from moe_kernels import configs, megablocks
from moe_kernels.checks import check_moe_mlp
from moe_kernels.grouped_mm.with_megablocks import rows_by_rows, rows_by_weights
from moe_kernels.moe_mlp.composed import Parts, compose
from moe_kernels.permutation.with_triton import copy_rows, sort_slots, sum_rows


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' SwiGLU MLPs: [T, D] -> [T, D]."""
    check_moe_mlp(x, w_gate_up, w_down, expert_ids, weights)
    configs.require_supported("moe_mlp", x)
    megablocks.require_supported("moe_mlp", x, *w_down.shape[1:])
    return _op(x, w_gate_up, w_down, expert_ids, weights)[0]


def _sort_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    block_rows = configs.plan_block_rows(expert_ids.numel(), num_experts, expert_ids.device)
    offsets, row_slot, slot_row, _ = sort_slots(expert_ids, num_experts, block_rows)
    return offsets, row_slot, slot_row


PARTS = Parts(_sort_slots, copy_rows, sum_rows, megablocks.group_sizes, rows_by_weights, rows_by_rows)
_op = compose("megablocks", PARTS)
