"""`swiglu` in Triton: one pass forward, one pass backward that recomputes the sigmoid. M rows, F MLP hidden size."""

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
from moe_kernels.swiglu.reference import check_arguments


@triton.jit(do_not_specialize=["M"])
def _forward(gate_up, y, M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r < M)[:, None] & (c < F)[None, :]
    at = gate_up + r.to(tl.int64)[:, None] * (2 * F) + c[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(y + r.to(tl.int64)[:, None] * F + c[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _backward(gate_up, dy, dx, M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (r < M)[:, None] & (c < F)[None, :]
    at = r.to(tl.int64)[:, None] * (2 * F) + c[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + F + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + r.to(tl.int64)[:, None] * F + c[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dx + at, (g * up * (sigmoid + silu * (1.0 - sigmoid))).to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + F + at, (g * silu).to(dx.dtype.element_ty), mask=mask)


def _config(ffn: int) -> Config:
    columns = min(power_of_2(ffn), 512)
    return Config(block_m=max(2048 // columns, 1), block_n=columns, block_k=1, warps=4, stages=3)


def _constants(ffn: int) -> dict[str, int]:
    config = _config(ffn)
    return {"F": ffn, "ROWS": config.block_m, "COLUMNS": config.block_n}


def _run(kernel: Any, ffn: int, *tensors: Tensor) -> None:
    """Over all rows of tensors[0], [..., 2F]."""
    config, rows = _config(ffn), tensors[0].shape[:-1].numel()
    grid = (cdiv(rows, config.block_m), cdiv(ffn, config.block_n))
    launch(kernel, grid, config, *tensors, rows, **_constants(ffn))


@torch.library.custom_op("moe_kernels::swiglu_triton", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    ffn = gate_up.shape[-1] // 2
    y = empty((*gate_up.shape[:-1], ffn), gate_up.dtype, gate_up.device)
    _run(_forward, ffn, gate_up.contiguous(), y)
    return y


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("moe_kernels::swiglu_backward_triton", mutates_args=())
def _swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    dx = empty(gate_up.shape, gate_up.dtype, gate_up.device)
    _run(_backward, dy.shape[-1], gate_up.contiguous(), dy.contiguous(), dx)
    return dx


@_swiglu_backward.register_fake
def _(gate_up: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(*ctx.saved_tensors, grad)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `moe_kernels.swiglu.reference.swiglu`; fp64 and more than 2^30 rows raise KernelError."""
    check_arguments(gate_up)
    configs.require_supported("swiglu", gate_up)
    rule = "the triton backend takes 2^30 rows (else use the torch backend)"
    require(gate_up.shape[:-1].numel() <= MAX_ROWS, "swiglu", rule, gate_up=gate_up)
    return _swiglu(gate_up)


_TYPES = {"gate_up": "*bf16", "y": "*bf16", "dy": "*bf16", "dx": "*bf16", "M": "i32"}
AOT_CASES = [
    AotCase(
        name=f"swiglu {kernel.__name__} F={ffn}",
        kernel=kernel,
        types={name: _TYPES[name] for name in kernel.arg_names if name in _TYPES},
        constexprs=_constants(ffn),
        num_warps=_config(ffn).warps,
        num_stages=_config(ffn).stages,
    )
    for kernel in (_forward, _backward)
    for ffn in (448, 3584)
]
