"""The grouped matrix product of one backend: fake kernels (shapes) and gradient, around the functions that the backend supplies."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.types import Plan, TileMap

Forward = Callable[[Tensor, Tensor, Tensor, TileMap | None], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, TileMap | None], tuple[Tensor, Tensor]]


def define(backend: str, forward: Forward, backward: Backward) -> Callable[[Tensor, Tensor, Plan], Tensor]:
    """Register `moe_kernels::grouped_mm_<backend>` and its backward; returns a function of (rows, w, plan).

    forward(rows [M, C], w [E, N, C], offsets [E + 1], the plan's tiles) -> [M, N]; backward(grad [M, N], rows, w, offsets, tiles)
    -> (gradients of rows and w).
    """

    def run(
        rows: Tensor,
        w: Tensor,
        offsets: Tensor,
        expert: Tensor | None,
        row: Tensor | None,
        live: Tensor | None,
        block_rows: int,
    ) -> Tensor:
        return forward(rows, w, offsets, _tiles(expert, row, live, block_rows))

    def run_backward(
        grad: Tensor,
        rows: Tensor,
        w: Tensor,
        offsets: Tensor,
        expert: Tensor | None,
        row: Tensor | None,
        live: Tensor | None,
        block_rows: int,
    ) -> tuple[Tensor, Tensor]:
        return backward(grad, rows, w, offsets, _tiles(expert, row, live, block_rows))

    op = torch.library.custom_op(f"moe_kernels::grouped_mm_{backend}", run, mutates_args=())
    backward_op = torch.library.custom_op(f"moe_kernels::grouped_mm_backward_{backend}", run_backward, mutates_args=())
    op.register_fake(lambda rows, w, *index: rows.new_empty(rows.shape[0], w.shape[1]))
    backward_op.register_fake(lambda grad, rows, w, *index: (torch.empty_like(rows), torch.empty_like(w)))

    def op_backward(ctx: Any, grad: Tensor) -> tuple:
        return *backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.block_rows), None, None, None, None, None

    op.register_autograd(op_backward, setup_context=_setup_context)
    return lambda rows, w, plan: op(rows, w, plan.offsets, *(plan.tiles or (None, None, None, 0)))


def _tiles(expert: Tensor | None, row: Tensor | None, live: Tensor | None, block_rows: int) -> TileMap | None:
    """A tile map from its fields, which is how it gets into an op."""
    return None if expert is None or row is None or live is None else TileMap(expert, row, live, block_rows)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.block_rows = inputs
    ctx.save_for_backward(*tensors)
