"""Checks of arguments: a mistake becomes a KernelError that names the argument, its shape, the rule and the remedy.

Everything that shapes, dtypes, devices and strides can tell is always checked. What only the values can tell (an expert id out of
range) would stall the device, so it is checked in debug mode only: `with debug_checks():`, or MOE_KERNELS_DEBUG=1 at import.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.types import Plan

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ROWS = 2**30  # kernels count rows in int32, and add a block or a range of them to a row's number
_debug = os.environ.get("MOE_KERNELS_DEBUG") == "1"


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Within this block, ops also check values (expert ids), at the price of a host sync for each call."""
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def require(ok: bool, op: str, rule: str, **values: Any) -> None:
    """Raise KernelError("op: rule; got name=shape dtype device, ...") unless `ok`."""
    if not ok:
        raise KernelError(f"{op}: {rule}; got " + ", ".join(f"{name}={_describe(value)}" for name, value in values.items()))


def check_expert_ids(op: str, expert_ids: Tensor, num_experts: int) -> None:
    """expert_ids [T, K] int32, contiguous, T * K at most 2^30; in debug mode also every id in [-1, num_experts)."""
    require(
        expert_ids.dim() == 2 and expert_ids.dtype == torch.int32,
        op,
        "expert_ids must be [T, K] int32 (use expert_ids.int())",
        expert_ids=expert_ids,
    )
    require(num_experts > 0, op, "num_experts must be at least 1", num_experts=num_experts)
    check_contiguous(op, expert_ids=expert_ids)
    slots = expert_ids.shape[0] * expert_ids.shape[1]
    require(
        slots <= MAX_ROWS, op, "T * K must be at most 2^30: rows are counted in int32 (split the batch)", expert_ids=expert_ids
    )
    if _debug:
        _check_id_values(op, expert_ids, num_experts)


def check_plan(op: str, plan: Plan, **beside: Tensor) -> None:
    """The plan's index tensors are int32, contiguous, on the device of the tensor `beside` them, and of as many slots."""
    (device,) = [tensor.device for tensor in beside.values()]
    for name in ("offsets", "row_slot", "slot_row"):
        index = getattr(plan, name)
        require(
            index.dtype == torch.int32 and index.device == device,
            op,
            f"plan.{name} must be int32 on {device} (make the plan with sort_by_expert of the same backend and device)",
            **{f"plan.{name}": index},
            **beside,
        )
        check_contiguous(op, **{f"plan.{name}": index})
    slots = {"plan.row_slot": plan.row_slot, "plan.slot_row": plan.slot_row}
    same = plan.slot_row.dim() == 2 and tuple(plan.row_slot.shape) == (plan.slot_row.numel(),)
    require(same, op, "plan.row_slot must be [T * K] where plan.slot_row is [T, K] (use sort_by_expert)", **slots)


def check_permute(x: Tensor, plan: Plan) -> None:
    """x [T, D] float, of the plan's T."""
    check_plan("permute", plan, x=x)
    _check_matrix("permute", x=x)
    tokens = plan.slot_row.shape[0]
    require(x.shape[0] == tokens, "permute", "x must have one row for each token of plan.slot_row", x=x, slot_row=plan.slot_row)


def check_unpermute(rows: Tensor, plan: Plan, weights: Tensor | None) -> None:
    """rows [M, D] float of the plan's M = T * K; weights [T, K] float or None."""
    check_plan("unpermute", plan, rows=rows)
    _check_matrix("unpermute", rows=rows)
    slots = plan.row_slot.shape[0]
    require(rows.shape[0] == slots, "unpermute", "rows must have one row for each slot of the plan", rows=rows, slots=slots)
    if weights is not None:
        _check_weights("unpermute", weights, plan.slot_row)


def check_grouped_mm(rows: Tensor, w: Tensor, plan: Plan) -> None:
    """rows [M, C] and w [E, N, C] of one float dtype; M and E are the plan's."""
    op = "grouped_mm"
    check_plan(op, plan, rows=rows)
    _check_matrix(op, rows=rows)
    require(w.dim() == 3 and w.shape[2] == rows.shape[1], op, "w must be [E, N, C] where rows is [M, C]", w=w, rows=rows)
    require(w.shape[0] == plan.num_experts, op, "w's first dim must be the plan's number of experts", w=w, E=plan.num_experts)
    require(rows.shape[0] == plan.row_slot.shape[0], op, "rows must have one row for each slot", rows=rows, slots=plan.row_slot)
    _check_same(op, rows=rows, w=w)
    check_contiguous(op, w=w)


def check_moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
    """All shapes, dtypes, devices and strides of moe_mlp's arguments."""
    op = "moe_mlp"
    _check_matrix(op, x=x)
    hidden = x.shape[1]
    require(
        w_down.dim() == 3 and w_down.shape[1] == hidden, op, "w_down must be [E, D, F] where x is [T, D]", w_down=w_down, x=x
    )
    num_experts, _, ffn = w_down.shape
    require(
        tuple(w_gate_up.shape) == (num_experts, 2 * ffn, hidden),
        op,
        "w_gate_up must be [E, 2F, D] (F gate rows, then F up rows) where w_down is [E, D, F]",
        w_gate_up=w_gate_up,
        w_down=w_down,
    )
    _check_same(op, x=x, w_gate_up=w_gate_up, w_down=w_down)
    check_contiguous(op, w_gate_up=w_gate_up, w_down=w_down)
    check_expert_ids(op, expert_ids, num_experts)
    require(expert_ids.shape[0] == x.shape[0], op, "expert_ids must have one row for each token", expert_ids=expert_ids, x=x)
    require(expert_ids.device == x.device, op, "expert_ids and x must be on one device", expert_ids=expert_ids, x=x)
    _check_weights(op, weights, expert_ids)


def check_contiguous(op: str, **tensors: Tensor) -> None:
    """Every tensor is contiguous."""
    for name, tensor in tensors.items():
        require(tensor.is_contiguous(), op, f"{name} must be contiguous (use {name}.contiguous())", **{name: tensor})


def _check_matrix(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.dim() == 2, op, f"{name} must be two-dimensional", **{name: tensor})
        require(tensor.dtype in FLOATS, op, f"{name} must be float16, bfloat16, float32 or float64", **{name: tensor})
    check_contiguous(op, **tensors)


def _check_same(op: str, **tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        same = tensor.dtype == reference.dtype and tensor.device == reference.device
        require(same, op, f"{name} must have {first}'s dtype and device (cast one)", **{name: tensor, first: reference})


def _check_weights(op: str, weights: Tensor, slots: Tensor) -> None:
    require(
        weights.shape == slots.shape and weights.dtype in FLOATS and weights.device == slots.device,
        op,
        "weights must be [T, K] float on the device of the expert ids",
        weights=weights,
        expert_ids=slots,
    )
    check_contiguous(op, weights=weights)


def _check_id_values(op: str, expert_ids: Tensor, num_experts: int) -> None:
    wrong = (expert_ids < -1) | (expert_ids >= num_experts)
    if bool(wrong.any()):
        token, slot = wrong.nonzero()[0].tolist()
        raise KernelError(
            f"{op}: expert_ids[{token}, {slot}] = {int(expert_ids[token, slot])} is outside of [-1, {num_experts}): "
            f"ids are 0..{num_experts - 1}, and -1 marks an empty slot"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
    return repr(value)
