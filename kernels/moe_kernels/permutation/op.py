"""The permutation ops of one backend: fake kernels (shapes) and gradients, around the functions that the backend supplies.

Both directions are gathers (a row knows its slot, a slot knows its row), so no gradient needs an atomic or a zeroed buffer.
T tokens, K choices, M = T * K slots, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PermutationOps(NamedTuple):
    """The custom ops of one backend."""

    permute: Callable[..., Tensor]  # (x [T, D], offsets, row_slot, slot_row) -> rows [M, D]
    unpermute: Callable[..., Tensor]  # (rows [M, D], offsets, row_slot, slot_row, weights [T, K] | None) -> [T, D]


def define(backend: str, copy_rows: Callable, sum_rows: Callable, split_rows: Callable) -> PermutationOps:
    """Register `moe_kernels::{permute,unpermute,unpermute_backward}_<backend>`.

    copy_rows(x, offsets, row_slot, slot_row) -> rows; sum_rows(rows, offsets, row_slot, slot_row, weights | None) -> [T, D];
    split_rows(grad [T, D], rows, offsets, row_slot, slot_row, weights) -> (grad of rows [M, D], grad of weights [T, K]).
    """
    permute = torch.library.custom_op(f"moe_kernels::permute_{backend}", copy_rows, mutates_args=())
    unpermute = torch.library.custom_op(f"moe_kernels::unpermute_{backend}", sum_rows, mutates_args=())
    split = torch.library.custom_op(f"moe_kernels::unpermute_backward_{backend}", split_rows, mutates_args=())
    permute.register_fake(lambda x, offsets, row_slot, slot_row: x.new_empty(row_slot.shape[0], x.shape[1]))
    unpermute.register_fake(_fake_unpermute)
    split.register_fake(
        lambda grad, rows, offsets, row_slot, slot_row, weights: (torch.empty_like(rows), torch.empty_like(weights))
    )

    def permute_backward(ctx: Any, grad: Tensor) -> tuple:
        return unpermute(grad.contiguous(), *ctx.saved_tensors, None), None, None, None

    def unpermute_backward(ctx: Any, grad: Tensor) -> tuple:
        *index, rows, weights = ctx.saved_tensors
        if weights is None:
            return permute(grad.contiguous(), *index), None, None, None, None
        grad_rows, grad_weights = split(grad.contiguous(), rows, *index, weights)
        return grad_rows, None, None, None, grad_weights

    permute.register_autograd(permute_backward, setup_context=_save_plan)
    unpermute.register_autograd(unpermute_backward, setup_context=_save_rows)
    return PermutationOps(permute, unpermute)


def _fake_unpermute(rows: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(slot_row.shape[0], rows.shape[1])


def _save_plan(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _save_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, offsets, row_slot, slot_row, weights = inputs
    # Without weights the gradient is a copy and needs no rows.
    ctx.save_for_backward(offsets, row_slot, slot_row, None if weights is None else rows, weights)
