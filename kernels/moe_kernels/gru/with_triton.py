"""`gru_step` in Triton: one kernel forward, two backward for the inputs and two for the weights. T tokens, P router width.

The P output columns are split over programs, since the gates are elementwise in columns, and the weights stream through the
load pipeline: held in registers, six blocks of P x P spill. Operands of the products have z's dtype; h is rounded as it is
loaded.

Backward writes the gradients of the pre-activations into one buffer [T, 4P] in z's dtype, in the order (n, r, u, m), where m is
the hidden half of the candidate: then (n, r, u) belongs to w_ih and (r, u, m) to w_hh, both without a gap.
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
from moe_kernels.gru import with_torch
from moe_kernels.gru.reference import check_arguments
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.partial_sums import range_rows, sum_partials
from moe_kernels.products import float32_precision
from moe_kernels.tiles import dot

_MAX_WIDTH = 16_384  # both gradients of weights and biases, [3P, P + 1], have 32-bit indices
_RANGES = 16  # of tokens, for the weight gradients: a constant, so that their bits depend on T only


@triton.jit
def _gates(
    z,
    h,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    t,
    c,
    P: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """r, u, n and the hidden half of n for the token rows `t` (int64, within bounds) and the columns `c`."""
    k = tl.arange(0, BK)
    column = tl.minimum(c, P - 1)  # the strided axis of the weights: a clamp needs no mask
    at_z = z + t[:, None] * P + k[None, :]
    at_h = h + t[:, None] * P + k[None, :]
    at_ih = w_ih + column[None, :] * P + k[:, None]
    at_hh = w_hh + column[None, :] * P + k[:, None]
    r = tl.zeros((BT, BN), tl.float32)
    u = tl.zeros((BT, BN), tl.float32)
    candidate = tl.zeros((BT, BN), tl.float32)
    hidden = tl.zeros((BT, BN), tl.float32)
    for k0 in range(0, P, BK):
        if P % BK == 0:
            vz = tl.load(at_z + k0)
            vh = tl.load(at_h + k0).to(vz.dtype)
            r = dot(vz, tl.load(at_ih + k0), r, PRECISION)
            u = dot(vz, tl.load(at_ih + (P * P + k0)), u, PRECISION)
            candidate = dot(vz, tl.load(at_ih + (2 * P * P + k0)), candidate, PRECISION)
            r = dot(vh, tl.load(at_hh + k0), r, PRECISION)
            u = dot(vh, tl.load(at_hh + (P * P + k0)), u, PRECISION)
            hidden = dot(vh, tl.load(at_hh + (2 * P * P + k0)), hidden, PRECISION)
        else:
            row, col = (k0 + k < P)[None, :], (k0 + k < P)[:, None]
            vz = tl.load(at_z + k0, mask=row, other=0.0)
            vh = tl.load(at_h + k0, mask=row, other=0.0).to(vz.dtype)
            r = dot(vz, tl.load(at_ih + k0, mask=col, other=0.0), r, PRECISION)
            u = dot(vz, tl.load(at_ih + (P * P + k0), mask=col, other=0.0), u, PRECISION)
            candidate = dot(vz, tl.load(at_ih + (2 * P * P + k0), mask=col, other=0.0), candidate, PRECISION)
            r = dot(vh, tl.load(at_hh + k0, mask=col, other=0.0), r, PRECISION)
            u = dot(vh, tl.load(at_hh + (P * P + k0), mask=col, other=0.0), u, PRECISION)
            hidden = dot(vh, tl.load(at_hh + (2 * P * P + k0), mask=col, other=0.0), hidden, PRECISION)
    live = c < P
    r += (tl.load(b_ih + c, mask=live, other=0.0) + tl.load(b_hh + c, mask=live, other=0.0)).to(tl.float32)[None, :]
    u += (tl.load(b_ih + P + c, mask=live, other=0.0) + tl.load(b_hh + P + c, mask=live, other=0.0)).to(tl.float32)[None, :]
    hidden += tl.load(b_hh + 2 * P + c, mask=live, other=0.0).to(tl.float32)[None, :]
    r = tl.sigmoid(r)
    candidate += tl.load(b_ih + 2 * P + c, mask=live, other=0.0).to(tl.float32)[None, :] + r * hidden
    n = 2.0 * tl.sigmoid(2.0 * candidate) - 1.0  # tanh, to 1e-7
    return r, tl.sigmoid(u), n, hidden


@triton.jit(do_not_specialize=["T"])
def _forward(
    z,
    h,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    out,
    T,
    P: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.minimum(t, T - 1).to(tl.int64)
    _, u, n, _ = _gates(z, h, w_ih, w_hh, b_ih, b_hh, rows, c, P, BT, BN, BK, PRECISION)
    at = rows[:, None] * P + c[None, :]
    mask = (t < T)[:, None] & (c < P)[None, :]
    state = tl.load(h + at, mask=mask, other=0.0)
    tl.store(out + at, n + u * (state - n), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _backward_gates(
    z,
    h,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    grad,
    gates,
    dh,
    T,
    P: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recomputes the gates; writes the gradients of the pre-activations, and grad * u, the part of dh that needs no product."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = tl.minimum(t, T - 1).to(tl.int64)
    r, u, n, hidden = _gates(z, h, w_ih, w_hh, b_ih, b_hh, rows, c, P, BT, BN, BK, PRECISION)
    at = rows[:, None] * P + c[None, :]
    mask = (t < T)[:, None] & (c < P)[None, :]
    g = tl.load(grad + at, mask=mask, other=0.0)
    tl.store(dh + at, g * u, mask=mask)
    to = gates + rows[:, None] * (4 * P) + c[None, :]
    du = g * (tl.load(h + at, mask=mask, other=0.0) - n) * u * (1.0 - u)
    tl.store(to + 2 * P, du.to(gates.dtype.element_ty), mask=mask)
    dn = g * (1.0 - u) * (1.0 - n * n)
    tl.store(to, dn.to(gates.dtype.element_ty), mask=mask)
    dn = dn * r
    tl.store(to + 3 * P, dn.to(gates.dtype.element_ty), mask=mask)
    tl.store(to + P, (dn * hidden * (1.0 - r)).to(gates.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _backward_inputs(
    gates,
    w_ih,
    w_hh,
    dz,
    dh,
    T,
    P: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz = [dr du dn] w_ih and dh += [dr du dm] w_hh; the products with r and u share their loads of the gates."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = tl.minimum(t, T - 1).to(tl.int64)
    at_gates = gates + rows[:, None] * (4 * P) + k[None, :]
    at_weight = k[:, None] * P + c[None, :]
    of_z = tl.zeros((BT, BN), tl.float32)
    of_h = tl.zeros((BT, BN), tl.float32)
    live = (c < P)[None, :]
    for k0 in range(0, 2 * P, BK):
        if P % BK == 0 and P % BN == 0:
            v = tl.load(at_gates + (P + k0))
            of_z = dot(v, tl.load(w_ih + k0 * P + at_weight), of_z, PRECISION)
            of_h = dot(v, tl.load(w_hh + k0 * P + at_weight), of_h, PRECISION)
        else:
            inner = k0 + k < 2 * P
            mask = inner[:, None] & live
            v = tl.load(at_gates + (P + k0), mask=inner[None, :], other=0.0)
            of_z = dot(v, tl.load(w_ih + k0 * P + at_weight, mask=mask, other=0.0), of_z, PRECISION)
            of_h = dot(v, tl.load(w_hh + k0 * P + at_weight, mask=mask, other=0.0), of_h, PRECISION)
    for k0 in range(0, P, BK):
        weight = (2 * P + k0) * P
        if P % BK == 0 and P % BN == 0:
            of_z = dot(tl.load(at_gates + k0), tl.load(w_ih + weight + at_weight), of_z, PRECISION)
            of_h = dot(tl.load(at_gates + (3 * P + k0)), tl.load(w_hh + weight + at_weight), of_h, PRECISION)
        else:
            inner = k0 + k < P
            mask = inner[:, None] & live
            v = tl.load(at_gates + k0, mask=inner[None, :], other=0.0)
            of_z = dot(v, tl.load(w_ih + weight + at_weight, mask=mask, other=0.0), of_z, PRECISION)
            v = tl.load(at_gates + (3 * P + k0), mask=inner[None, :], other=0.0)
            of_h = dot(v, tl.load(w_hh + weight + at_weight, mask=mask, other=0.0), of_h, PRECISION)
    at = rows[:, None] * P + c[None, :]
    mask = (t < T)[:, None] & live
    tl.store(dz + at, of_z.to(dz.dtype.element_ty), mask=mask)
    tl.store(dh + at, of_h + tl.load(dh + at, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["T", "span"])
def _backward_weights(
    gates,
    x,
    partials,
    T,
    span,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial s of the gradients of one weight and its bias, [3P * P + 3P] each, over the tokens [s * span, (s + 1) * span).

    HIDDEN: w_hh with x = h and gates (r, u, m), else w_ih with x = z and gates (n, r, u), whose rows turn to (r, u, n) as they
    are stored.
    """
    s = tl.program_id(0)
    g = tl.program_id(1) * BM + tl.arange(0, BM)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    i = tl.arange(0, BR)
    first = P if HIDDEN else 0
    dw = tl.zeros((BM, BN), tl.float32)
    db = tl.zeros((BM,), tl.float32)
    end = tl.minimum((s + 1) * span, T)
    for start in range(s * span, end, BR):
        rows = (start + i).to(tl.int64)
        real = start + i < end
        # the gates come transposed by pointer order: a transposed tile would leave the load pipeline on sm_80
        mask = real[None, :] & (g < 3 * P)[:, None]
        a = tl.load(gates + rows[None, :] * (4 * P) + (first + g)[:, None], mask=mask, other=0.0)
        mask = real[:, None] & (c < P)[None, :]
        b = tl.load(x + rows[:, None] * P + c[None, :], mask=mask, other=0.0).to(a.dtype)
        dw = dot(a, b, dw, PRECISION)
        db += tl.sum(a.to(tl.float32), 1)
    row = g if HIDDEN else tl.where(g < P, g + 2 * P, g - P)
    to = partials + s.to(tl.int64) * (3 * P * P + 3 * P)
    tl.store(to + row[:, None] * P + c[None, :], dw, mask=(g < 3 * P)[:, None] & (c < P)[None, :])
    if tl.program_id(2) == 0:
        tl.store(to + 3 * P * P + row, db, mask=g < 3 * P)


# block_m tokens x block_n columns x block_k along P; for the weights block_m gates x block_n columns x block_k tokens
_CONFIGS = {
    "forward": Config(block_m=64, block_n=32, block_k=32, warps=4, stages=3),
    "gates": Config(block_m=64, block_n=32, block_k=32, warps=4, stages=3),
    "inputs": Config(block_m=64, block_n=64, block_k=32, warps=4, stages=3),
    "weights": Config(block_m=64, block_n=64, block_k=32, warps=4, stages=4),
}


def _constants(name: str, width: int, precision: str) -> dict[str, Any]:
    config, columns = _CONFIGS[name], power_of_2(width, 16)
    block_m, block_n, block_k = config.block_m, min(config.block_n, columns), config.block_k
    if name == "weights":
        return {"P": width, "BM": block_m, "BN": block_n, "BR": block_k, "PRECISION": precision}
    return {"P": width, "BT": block_m, "BN": block_n, "BK": min(block_k, columns), "PRECISION": precision}


def _run(name: str, kernel: Any, tokens: int, width: int, *args: Any) -> None:
    constants = _constants(name, width, float32_precision())
    grid = (cdiv(tokens, constants["BT"]), cdiv(width, constants["BN"]))
    launch(kernel, grid, _CONFIGS[name], *args, tokens, **constants)


@torch.library.custom_op("moe_kernels::gru_step_triton", mutates_args=())
def _gru_step(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    z, h, b_ih, b_hh = z.contiguous(), h.contiguous(), b_ih.contiguous(), b_hh.contiguous()
    out = empty(h.shape, h.dtype, h.device)
    _run("forward", _forward, *z.shape, z, h, _operand(w_ih, z), _operand(w_hh, z), b_ih, b_hh, out)
    return out


@_gru_step.register_fake
def _(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _operand(weight: Tensor, z: Tensor) -> Tensor:
    return weight.to(z.dtype).contiguous()


@torch.library.custom_op("moe_kernels::gru_step_backward_triton", mutates_args=())
def _backward_of_inputs(
    z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dh and the gradients of the pre-activations [T, 4P]."""
    z, h, b_ih, b_hh = z.contiguous(), h.contiguous(), b_ih.contiguous(), b_hh.contiguous()
    w_ih, w_hh = _operand(w_ih, z), _operand(w_hh, z)
    tokens, width = z.shape
    gates = empty((tokens, 4 * width), z.dtype, z.device)
    dz, dh = empty(z.shape, z.dtype, z.device), empty(h.shape, h.dtype, h.device)
    _run("gates", _backward_gates, tokens, width, z, h, w_ih, w_hh, b_ih, b_hh, grad.contiguous(), gates, dh)
    _run("inputs", _backward_inputs, tokens, width, gates, w_ih, w_hh, dz, dh)
    return dz, dh, gates


@_backward_of_inputs.register_fake
def _(
    z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    return dz, torch.empty_like(h, memory_format=torch.contiguous_format), z.new_empty(z.shape[0], 4 * z.shape[1])


@torch.library.custom_op("moe_kernels::gru_step_weights_triton", mutates_args=())
def _backward_of_weights(gates: Tensor, z: Tensor, h: Tensor) -> Tensor:
    """The gradients of w_ih, b_ih, w_hh and b_hh, one after the other, fp32: one ordered sum serves all four."""
    z, h = z.contiguous(), h.contiguous()
    tokens, width = z.shape
    constants, config = _constants("weights", width, float32_precision()), _CONFIGS["weights"]
    span = range_rows(tokens, _RANGES, config.block_k)
    ranges = cdiv(tokens, span) if tokens else 0
    partials = empty((2, ranges, 3 * width * (width + 1)), torch.float32, z.device)
    grid = (ranges, cdiv(3 * width, constants["BM"]), cdiv(width, constants["BN"]))
    parts = partials.unbind(0)
    for x, part, hidden in zip((z, h), parts, (False, True), strict=True):
        launch(_backward_weights, grid, config, gates, x, part, tokens, span, **constants, HIDDEN=hidden)
    return torch.cat([sum_partials(part, torch.float32) for part in parts])


@_backward_of_weights.register_fake
def _(gates: Tensor, z: Tensor, h: Tensor) -> Tensor:
    return z.new_empty(6 * z.shape[1] * (z.shape[1] + 1), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, h, w_ih, w_hh, b_ih, b_hh = ctx.saved_tensors
    dz, dh, gates = _backward_of_inputs(z, h, w_ih, w_hh, b_ih, b_hh, grad)
    if not any(ctx.needs_input_grad[2:]):
        return dz, dh, None, None, None, None
    width = z.shape[1]
    flat = _backward_of_weights(gates, z, h).split([3 * width * width, 3 * width] * 2)
    dw_ih, db_ih, dw_hh, db_hh = (part.to(weight.dtype) for part, weight in zip(flat, (w_ih, b_ih, w_hh, b_hh), strict=True))
    return dz, dh, dw_ih.view(3 * width, width), dw_hh.view(3 * width, width), db_ih, db_hh


_gru_step.register_autograd(_differentiate, setup_context=_save)


def gru_step(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """See `moe_kernels.gru.reference.gru_step`; fp64, P above 16,384 and T above 2^30 raise KernelError. fp32
    products follow torch's float32 matmul precision.

    An input wider than the state is one large product, which the library does best, so that form is the torch backend's.
    """
    check_arguments(z, h, w_ih, w_hh, b_ih, b_hh)
    if z.shape[1] != h.shape[1]:
        return with_torch.gru_step(z, h, w_ih, w_hh, b_ih, b_hh)
    configs.require_supported("gru_step", z)
    rule = f"the triton backend takes P up to {_MAX_WIDTH} and T up to 2^30 (else use the torch backend)"
    require(z.shape[0] <= MAX_ROWS and z.shape[1] <= _MAX_WIDTH, "gru_step", rule, z=z)
    return _gru_step(z, h, w_ih, w_hh, b_ih, b_hh)


_TYPES = dict.fromkeys(("z", "w_ih", "w_hh", "gates", "dz"), "*bf16") | {"T": "i32", "span": "i32"}
_TYPES |= dict.fromkeys(("h", "b_ih", "b_hh", "out", "grad", "dh", "partials"), "*fp32")


def _aot_case(name: str, kernel: Any, width: int, types: dict[str, str], **constants: Any) -> AotCase:
    config = _CONFIGS[name]
    return AotCase(
        name=" ".join([f"gru {name} P={width}", *(f"{key}={value}" for key, value in constants.items())]),
        kernel=kernel,
        types={arg: (_TYPES | types)[arg] for arg in kernel.arg_names if arg in _TYPES | types},
        constexprs=_constants(name, width, "ieee") | constants,
        num_warps=config.warps,
        num_stages=config.stages,
        piped_operands={"inputs": 7, "weights": 2}.get(name, 8),
    )


AOT_CASES = [
    case
    for width in (128, 256)
    for case in (
        _aot_case("forward", _forward, width, {}),
        _aot_case("gates", _backward_gates, width, {}),
        _aot_case("inputs", _backward_inputs, width, {}),
        _aot_case("weights", _backward_weights, width, {"x": "*bf16"}, HIDDEN=False),
        _aot_case("weights", _backward_weights, width, {"x": "*fp32"}, HIDDEN=True),
    )
]
