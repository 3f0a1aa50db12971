"""`rms_norm` and `add_rms_norm` in Triton: one pass forward, one pass and an ordered sum of weight-gradient partials backward.

T tokens, D hidden. A program holds whole rows: D is padded to the next power of two, whose surplus lanes are masked and cost
registers only.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import MAX_ROWS, require
from moe_kernels.configs import Config
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.partial_sums import AOT_CASES as SUM_CASES
from moe_kernels.partial_sums import range_rows, sum_partials
from moe_kernels.rms_norm.reference import check_arguments

_RANGES = 256  # a constant, not twice the number of multiprocessors: the weight gradient has the same bits on every GPU
_MAX_HIDDEN = 8192


@triton.jit(do_not_specialize=["T"])
def _forward(x, branch, weight, total, y, rstd, T, eps, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, ADD: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.arange(0, BD)
    mask = (t < T)[:, None] & (c < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + c[None, :]
    v = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        v = (v.to(tl.float32) + tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, v, mask=mask)
    v = v.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / D + eps)
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(y + at, (v * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + t, scale, mask=t < T)


@triton.jit(do_not_specialize=["T", "rows"])
def _backward(
    x,
    weight,
    rstd,
    dy,
    dtotal,
    dx,
    partials,
    T,
    rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program p handles tokens [p * rows, (p + 1) * rows): their dx, and one partial of the weight gradient."""
    first = tl.program_id(0) * rows
    c = tl.arange(0, BD)
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BD,), tl.float32)
    for start in range(first, tl.minimum(first + rows, T), BT):
        t = start + tl.arange(0, BT)
        mask = (t < T)[:, None] & (c < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + c[None, :]
        scale = tl.load(rstd + t, mask=t < T, other=0.0)[:, None]
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        product = g * normed
        dw += tl.sum(product, 0)
        mean = tl.sum(product * w[None, :], 1) / D
        d = scale * (g * w[None, :] - normed * mean[:, None])
        if ADD:
            d += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
    tl.store(partials + tl.program_id(0) * D + c, dw, mask=c < D)


def _config(kernel: Any, hidden: int) -> Config:
    """block_m rows of a tile, block_n lanes of a row. Backward has few programs, so each keeps more bytes in flight."""
    lanes, backward = power_of_2(hidden, 16), kernel is _backward
    rows = max((4096 if backward else 2048) // lanes, 1)
    return Config(block_m=rows, block_n=lanes, block_k=1, warps=8 if backward or lanes > 2048 else 4, stages=3)


def _constants(kernel: Any, hidden: int, add: bool) -> dict[str, Any]:
    config = _config(kernel, hidden)
    return {"D": hidden, "BD": config.block_n, "BT": config.block_m, "ADD": add}


def _run_forward(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    tokens, hidden = x.shape[:-1].numel(), x.shape[-1]
    config = _config(_forward, hidden)
    y, rstd = empty(x.shape, x.dtype, x.device), empty((tokens,), torch.float32, x.device)
    total, branch_rows = (x, x) if branch is None else (empty(x.shape, x.dtype, x.device), branch.contiguous())
    args = (x, branch_rows, weight.contiguous(), total, y, rstd, tokens, eps)
    launch(_forward, cdiv(tokens, config.block_m), config, *args, **_constants(_forward, hidden, branch is not None))
    return total, y, rstd


@torch.library.custom_op("moe_kernels::rms_norm_triton", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _run_forward(x, None, weight, eps)[1:]


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _fake_rstd(x)


@torch.library.custom_op("moe_kernels::add_rms_norm_triton", mutates_args=())
def _add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run_forward(x, branch, weight, eps)


@_add_rms_norm.register_fake
def _(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(y), y, _fake_rstd(x)


def _fake_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("moe_kernels::rms_norm_backward_triton", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor]:
    x, dy = x.contiguous(), dy.contiguous()
    tokens, hidden = rstd.numel(), x.shape[-1]
    dx = empty(x.shape, x.dtype, x.device)
    config = _config(_backward, hidden)
    rows = range_rows(tokens, _RANGES, config.block_m)
    programs = cdiv(tokens, rows) if tokens else 0
    partials = empty((programs, hidden), torch.float32, x.device)
    add = dy if dtotal is None else dtotal.contiguous()
    args = (x, weight.contiguous(), rstd, dy, add, dx, partials, tokens, rows)
    launch(_backward, programs, config, *args, **_constants(_backward, hidden, dtotal is not None))
    return dx, sum_partials(partials, weight.dtype)


@_rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _differentiate_norm(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_rms_norm_backward(*ctx.saved_tensors, dy, None), None


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[2], output[2])


def _differentiate_add_norm(ctx: Any, dtotal: Tensor, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = _rms_norm_backward(*ctx.saved_tensors, dy, dtotal)
    return dx, dx, dw, None


_rms_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
_add_rms_norm.register_autograd(_differentiate_add_norm, setup_context=_save_add_norm)


def _check(op: str, x: Tensor) -> None:
    configs.require_supported(op, x)
    rule = f"the triton backend takes D up to {_MAX_HIDDEN} and 2^30 rows (else use the torch backend)"
    require(x.shape[-1] <= _MAX_HIDDEN and x.shape[:-1].numel() <= MAX_ROWS, op, rule, x=x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `moe_kernels.rms_norm.reference.rms_norm`; fp64, D above 8,192 and T above 2^30 raise KernelError."""
    check_arguments("rms_norm", x, weight, eps)
    _check("rms_norm", x)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `moe_kernels.rms_norm.reference.add_rms_norm`; fp64, D above 8,192 and T above 2^30 raise KernelError."""
    check_arguments("add_rms_norm", x, weight, eps, branch)
    _check("add_rms_norm", x)
    total, y, _ = _add_rms_norm(x, branch, weight, eps)
    return total, y


def _aot_cases(hidden: int) -> list[AotCase]:
    row = dict.fromkeys(("x", "branch", "total", "y", "dy", "dtotal", "dx"), "*bf16")
    row |= {"weight": "*fp32", "rstd": "*fp32", "partials": "*fp32", "T": "i32", "rows": "i32", "eps": "fp32"}
    return [
        AotCase(
            name=f"rms_norm {kernel.__name__} D={hidden} add={add}",
            kernel=kernel,
            types={name: row[name] for name in kernel.arg_names if name in row},
            constexprs=_constants(kernel, hidden, add),
            num_warps=_config(kernel, hidden).warps,
            num_stages=_config(kernel, hidden).stages,
        )
        for kernel in (_forward, _backward)
        for add in (False, True)
    ]


AOT_CASES = [*SUM_CASES, *(case for hidden in (64, 1280, 8192) for case in _aot_cases(hidden))]
