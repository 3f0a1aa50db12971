"""The fused expert MLP of one backend: fake kernels (shapes), the saved set and the gradient, around the backend's functions.

Saved for backward: x, the pre-activation z, the index tensors and the arguments themselves; the activation is recomputed from z and the
down projection's rows are never kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out [T, D], z [M, 2F], offsets [E + 1], row_slot [M], slot_row [T, K]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]  # gradients of x, w_gate_up, w_down, weights


def define(backend: str, forward: Callable[..., Forward], backward: Callable[..., Backward]) -> Callable[..., Forward]:
    """Register `moe_kernels::moe_mlp_<backend>` and its backward.

    forward(x, w_gate_up, w_down, expert_ids, weights) -> Forward;
    backward(grad, x, w_gate_up, w_down, weights, z, offsets, row_slot, slot_row) -> Backward.
    """
    op = torch.library.custom_op(f"moe_kernels::moe_mlp_{backend}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"moe_kernels::moe_mlp_backward_{backend}", backward, mutates_args=())
    op.register_fake(_fake_forward)
    backward_op.register_fake(
        lambda grad, x, w_gate_up, w_down, weights, *saved: tuple(map(torch.empty_like, (x, w_gate_up, w_down, weights)))
    )

    def op_backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
        if grad is None:
            return None, None, None, None, None
        x, w_gate_up, w_down, weights = backward_op(grad.contiguous(), *ctx.saved_tensors)
        return x, w_gate_up, w_down, None, weights

    op.register_autograd(op_backward, setup_context=_setup_context)
    return op


def _fake_forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Forward:
    slots = expert_ids.shape[0] * expert_ids.shape[1]
    offsets = expert_ids.new_empty(w_down.shape[0] + 1)
    return (
        torch.empty_like(x),
        x.new_empty(slots, w_gate_up.shape[1]),
        offsets,
        expert_ids.new_empty(slots),
        torch.empty_like(expert_ids),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Forward) -> None:
    x, w_gate_up, w_down, _, weights = inputs
    _, z, *index = output
    ctx.mark_non_differentiable(z, *index)
    ctx.set_materialize_grads(False)  # else a zero tensor would be made for z's gradient
    ctx.save_for_backward(x, w_gate_up, w_down, weights, z, *index)
