"""The grouped matrix product of one backend: fake kernels (shapes) and gradient, around the functions that the backend supplies."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.types import Plan


def define(backend: str, forward: Callable, backward: Callable) -> Callable[[Tensor, Tensor, Plan], Tensor]:
    """Register `moe_kernels::grouped_mm_<backend>` and its backward; returns a function of (rows, w, plan).

    forward(rows [M, C], w [E, N, C], offsets [E + 1], *tiles) -> [M, N]; backward(grad [M, N], rows, w, offsets, *tiles) -> (gradients
    of rows and w). tiles: the fields of the plan's tile map, or three times None and 0.
    """
    op = torch.library.custom_op(f"moe_kernels::grouped_mm_{backend}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"moe_kernels::grouped_mm_backward_{backend}", backward, mutates_args=())
    op.register_fake(lambda rows, w, *index: rows.new_empty(rows.shape[0], w.shape[1]))
    backward_op.register_fake(lambda grad, rows, w, *index: (torch.empty_like(rows), torch.empty_like(w)))

    def op_backward(ctx: Any, grad: Tensor) -> tuple:
        return *backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.block_rows), None, None, None, None, None

    op.register_autograd(op_backward, setup_context=_setup_context)
    return lambda rows, w, plan: op(rows, w, plan.offsets, *(plan.tiles or (None, None, None, 0)))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.block_rows = inputs
    ctx.save_for_backward(*tensors)
