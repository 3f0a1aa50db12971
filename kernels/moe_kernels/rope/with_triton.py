"""`rope` in Triton: one pass, any strides of x over rows, positions and heads. B rows, S positions, H heads, d head
dimension."""

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
from moe_kernels.rope.reference import check_arguments


@triton.jit(do_not_specialize=["count", "S"])
def _rotate(
    x,
    cos,
    sin,
    y,
    count,
    S,
    row_stride,
    position_stride,
    head_stride,
    H: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    VECTORS: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    SIGN: tl.constexpr,
):
    """VECTORS of the `count` = B * S * H head vectors. TABLE_ROWS: each row has tables of its own."""
    i = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    c = tl.arange(0, LANES)
    mask = (i < count)[:, None] & (c < HALF)[None, :]
    token = i // H
    row, position = token // S, token % S
    table = (token if TABLE_ROWS else position).to(tl.int64)[:, None] * HALF + c[None, :]
    cosine = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32) * SIGN
    source = row.to(tl.int64) * row_stride + position.to(tl.int64) * position_stride + (i % H).to(tl.int64) * head_stride
    first = tl.load(x + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + HALF + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    out = y + i.to(tl.int64)[:, None] * (2 * HALF) + c[None, :]
    tl.store(out, (first * cosine - second * sine).to(y.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (second * cosine + first * sine).to(y.dtype.element_ty), mask=mask)


def _config(half: int) -> Config:
    """Head vectors of a program, lanes of half a head."""
    lanes = power_of_2(half)
    return Config(block_m=max(1024 // lanes, 1), block_n=lanes, block_k=1, warps=4, stages=3)


def _constants(heads: int, half: int, table_rows: bool, sign: int) -> dict[str, Any]:
    config = _config(half)
    shape = {"H": heads, "HALF": half, "LANES": config.block_n, "VECTORS": config.block_m}
    return shape | {"TABLE_ROWS": table_rows, "SIGN": sign}


@torch.library.custom_op("moe_kernels::rope_triton", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, length, heads, dim = x.shape
    y = empty(x.shape, x.dtype, x.device)
    config, count = _config(dim // 2), rows * length * heads
    args = (x, cos.contiguous(), sin.contiguous(), y, count, length, *x.stride()[:3])
    launch(_rotate, cdiv(count, config.block_m), config, *args, **_constants(heads, dim // 2, cos.shape[0] > 1, sign))
    return y


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.sign = inputs[3]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rope(grad, *ctx.saved_tensors, -ctx.sign), None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `moe_kernels.rope.reference.rope`; fp64 and B * S * H above 2^30 raise KernelError. x may be a slice of a fused
    projection."""
    check_arguments(x, cos, sin)
    configs.require_supported("rope", x)
    require(x.shape[:3].numel() <= MAX_ROWS, "rope", "B * S * H must be at most 2^30 (split the batch)", x=x)
    return _rope(x, cos, sin, 1)


_POINTERS = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "y": "*bf16"}
_INTEGERS = dict.fromkeys(("count", "S", "row_stride", "position_stride", "head_stride"), "i32")
AOT_CASES = [
    AotCase(
        name=f"rope d={2 * half} tables per row={per_row} sign={sign}",
        kernel=_rotate,
        types=_POINTERS | _INTEGERS,
        constexprs=_constants(20, half, per_row, sign),
        num_warps=_config(half).warps,
        num_stages=_config(half).stages,
    )
    for half in (32, 64)
    for per_row in (False, True)
    for sign in (1, -1)
]
