"""moe_mlp as Triton kernels; the signature is documented in reference.py.

Forward: sort, then `up` (rows of x gathered in the operand load, SwiGLU in the epilogue, which writes the pre-activation z and the
activation y), `down` to contiguous rows, and a gather and weighted sum over K. Backward: `da` (gathers the gradient, multiplies by
w_down, recomputes the activation from z in its epilogue and writes dz, the scaled activation and partial sums of the routing gradient),
the ordered sum of those partials, and the four products for dx, w_gate_up and w_down. Seven launches forward, eight backward; no
atomics, no host sync, grids from shapes only: a CUDA graph captured at fixed T replays with any routing.

T tokens, K choices, E experts, D hidden, F expert hidden, M = T * K slots.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import check_moe_mlp
from moe_kernels.configs import FLAGSHIP, Config, Entry
from moe_kernels.grouped_mm.with_triton import rows_outer, rows_product
from moe_kernels.launch import cdiv, empty, grid_size, launch
from moe_kernels.moe_mlp.op import Backward, Forward, define
from moe_kernels.permutation.with_triton import map_tiles, sort_slots, sum_rows
from moe_kernels.tiles import column_halves, dot
from moe_kernels.types import TileMap

_DS = Config(block_m=256, block_n=1, block_k=1, warps=4, stages=1)


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' SwiGLU MLPs: [T, D] -> [T, D]."""
    check_moe_mlp(x, w_gate_up, w_down, expert_ids, weights)
    configs.require_supported("moe_mlp", x, w_gate_up)
    return _op(x, w_gate_up, w_down, expert_ids, weights)[0]


def up_swiglu(
    x: Tensor, w_gate_up: Tensor, offsets: Tensor, row_slot: Tensor, top_k: int, config: Config, tiles: TileMap
) -> tuple[Tensor, Tensor]:
    """z [M, 2F] = x[token] @ w_gate_up[e]^T and y [M, F] = silu(gate) * up, of the rounded z."""
    slots, ffn, hidden = row_slot.shape[0], w_gate_up.shape[1] // 2, x.shape[1]
    z, y = empty((slots, 2 * ffn), x.dtype, x.device), empty((slots, ffn), x.dtype, x.device)
    programs = grid_size(tiles.expert.shape[0] * cdiv(ffn, config.block_n), config, x.device)
    w_arg: Any = w_gate_up
    if config.variant == "tma":
        box = [1, 2, config.block_n, config.block_k]
        w_arg = TensorDescriptor.from_tensor(w_gate_up.view(-1, 2, ffn, hidden), box)
    constants = _up_constants(config, hidden, ffn, top_k)
    launch(_up, programs, config, x, w_arg, row_slot, offsets, tiles.expert, tiles.row, tiles.live, z, y, **constants)
    return z, y


def down_gradient(
    grad: Tensor, w_down: Tensor, weights: Tensor, z: Tensor, offsets: Tensor, row_slot: Tensor, config: Config, tiles: TileMap
) -> tuple[Tensor, Tensor, Tensor]:
    """dz [M, 2F], the activation times the routing weight [M, F], and partial sums [ceil(F / BN), M] of the routing gradient."""
    slots, ffn, hidden = row_slot.shape[0], w_down.shape[2], w_down.shape[1]
    column_tiles = cdiv(ffn, config.block_n)
    dz, ya = empty(z.shape, z.dtype, z.device), empty((slots, ffn), z.dtype, z.device)
    partial = empty((column_tiles, slots), torch.float32, z.device)
    programs = grid_size(tiles.expert.shape[0] * column_tiles, config, z.device)
    w_arg: Any = w_down
    if config.variant == "tma":
        w_arg = TensorDescriptor.from_tensor(w_down, [1, config.block_k, config.block_n])
    args = (grad, w_arg, row_slot, weights, offsets, tiles.expert, tiles.row, tiles.live, z, dz, ya, partial, slots)
    launch(_down_gradient, programs, config, *args, **_da_constants(config, hidden, ffn, weights.shape[1]))
    return dz, ya, partial


def sum_partials(partial: Tensor, slot_row: Tensor, weights: Tensor) -> Tensor:
    """The routing gradient [T, K]: partials of the slot's row, added in order; zero for an empty slot."""
    grad = empty(weights.shape, weights.dtype, weights.device)
    column_tiles, slots = partial.shape
    constants = {"NN": column_tiles, "B": _DS.block_m}
    launch(_sum_partials, cdiv(slots, _DS.block_m), _DS, partial, slot_row, grad, slots, **constants)
    return grad


def _forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Forward:
    num_experts = w_down.shape[0]
    config = configs.pick("up", x, w_gate_up, rows_per_expert=expert_ids.numel() / num_experts)
    offsets, row_slot, slot_row, tiles = sort_slots(expert_ids, num_experts, config.block_m)
    z, y = up_swiglu(x, w_gate_up, offsets, row_slot, slot_row.shape[1], config, tiles)
    rows = rows_product("down", y, w_down, offsets, transposed=True, tiles=tiles)
    return sum_rows(rows, offsets, row_slot, slot_row, weights), z, offsets, row_slot, slot_row


def _backward(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    z: Tensor,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
) -> Backward:
    slots, top_k = row_slot.shape[0], slot_row.shape[1]
    config = configs.pick("da", grad, w_down, rows_per_expert=slots / w_down.shape[0])
    tiles = map_tiles(offsets, slots, config.block_m)
    dz, ya, partial = down_gradient(grad, w_down, weights, z, offsets, row_slot, config, tiles)
    grad_weights = sum_partials(partial, slot_row, weights)
    grad_w_down = rows_outer("dw2", grad, ya, offsets, row_slot, gather_a=top_k)
    del ya, partial  # before the next temporary is made: the peak of the backward pass is what limits the micro-batch
    rows = rows_product("dxe", dz, w_gate_up, offsets, transposed=False, tiles=tiles)
    grad_x = sum_rows(rows, offsets, row_slot, slot_row, None)
    del rows
    grad_w_gate_up = rows_outer("dw1", dz, x, offsets, row_slot, gather_b=top_k)
    return grad_x, grad_w_gate_up, grad_w_down, grad_weights


def _up_constants(config: Config, hidden: int, ffn: int, top_k: int) -> dict[str, Any]:
    return {
        "D": hidden, "F": ffn, "K": top_k, "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        "VARIANT": config.variant, "PERSISTENT": config.persistent, "FLATTEN": config.flatten, "PRECISION": config.precision,
    }  # fmt: skip


_da_constants = _up_constants


@triton.jit
def _up(
    x, w, row_slot, offsets, tile_expert, tile_row, tile_count, z, y,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    VARIANT: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """1-D grid over (row tile, column tile), columns fastest: x rows come from memory once and are used by neighbouring programs."""
    NN: tl.constexpr = (F + BN - 1) // BN
    if PERSISTENT:
        for q in tl.range(tl.program_id(0), tl.load(tile_count) * NN, tl.num_programs(0), flatten=FLATTEN):
            e = tl.load(tile_expert + q // NN)
            first = tl.load(tile_row + q // NN)
            end = tl.load(offsets + e + 1)
            _up_tile(x, w, row_slot, z, y, e, first, end, (q % NN) * BN, D, F, K, BM, BN, BK, VARIANT, PRECISION)
    else:
        q = tl.program_id(0)
        e = tl.load(tile_expert + q // NN)
        if e < 0:
            return
        first = tl.load(tile_row + q // NN)
        end = tl.load(offsets + e + 1)
        _up_tile(x, w, row_slot, z, y, e, first, end, (q % NN) * BN, D, F, K, BM, BN, BK, VARIANT, PRECISION)


@triton.jit
def _up_tile(
    x, w, row_slot, z, y, e, first, end, n0,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    VARIANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BM)
    token = _tokens(row_slot, r, first, end, K)
    x_tile = x + token[:, None] * D + tl.arange(0, BK)[None, :]
    if VARIANT == "pointer":
        gate, up = _up_dual(x_tile, w + e.to(tl.int64) * (2 * F * D), n0, D, F, BM, BN, BK, PRECISION)
    else:
        acc = _up_wide(x_tile, w, e, n0, D, F, BM, BN, BK, VARIANT == "tma", PRECISION)
        gate, up = column_halves(acc, BM, 2 * BN)
    n = tl.arange(0, BN)
    mask = (r < end - first)[:, None]
    if F % BN != 0:
        mask = mask & (n0 + n < F)[None, :]
    gate = gate.to(z.dtype.element_ty)
    up = up.to(z.dtype.element_ty)
    z_tile = z + first.to(tl.int64) * (2 * F) + n0 + (r[:, None] * (2 * F) + n[None, :])
    tl.store(z_tile, gate, mask=mask)
    tl.store(z_tile + F, up, mask=mask)
    gate = gate.to(tl.float32)  # the activation is a function of the rounded z, so that backward recomputes the very same one
    value = gate * tl.sigmoid(gate) * up.to(tl.float32)
    tl.store(y + first.to(tl.int64) * F + n0 + (r[:, None] * F + n[None, :]), value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tokens(row_slot, r, first, end, K: tl.constexpr):
    """Tokens of the tile's rows. Rows past the expert's end are clamped to its last row: no mask in the loop, nothing stored."""
    return (tl.load(row_slot + first + tl.minimum(r, end - first - 1)) // K).to(tl.int64)


@triton.jit
def _up_dual(
    x_tile, w, n0,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two accumulators [BM, BN], gate and up. w points at the expert's [2F, D]."""
    n = tl.minimum(n0 + tl.arange(0, BN), F - 1)
    k = tl.arange(0, BK)
    w_tile = w + n[None, :] * D + k[:, None]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        if D % BK == 0:
            a = tl.load(x_tile + k0)
            b_gate = tl.load(w_tile + k0)
            b_up = tl.load(w_tile + (k0 + F * D))
        else:
            left = k0 + k < D
            a = tl.load(x_tile + k0, mask=left[None, :], other=0.0)
            b_gate = tl.load(w_tile + k0, mask=left[:, None], other=0.0)
            b_up = tl.load(w_tile + (k0 + F * D), mask=left[:, None], other=0.0)
        gate = dot(a, b_gate, gate, PRECISION)
        up = dot(a, b_up, up, PRECISION)
    return gate, up


@triton.jit
def _up_wide(
    x_tile, w, e, n0,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One accumulator [BM, 2 BN]: BN gate columns, then BN up columns. TMA: w is a descriptor of [E, 2, F, D], zero past F."""
    k = tl.arange(0, BK)
    n = tl.arange(0, 2 * BN)
    if not TMA:
        column = tl.minimum(n0 + n % BN, F - 1) + n // BN * F
        w_tile = w + e.to(tl.int64) * (2 * F * D) + column[None, :] * D + k[:, None]
    acc = tl.zeros((BM, 2 * BN), tl.float32)
    for k0 in range(0, D, BK):
        left = k0 + k < D
        a = tl.load(x_tile + k0) if D % BK == 0 else tl.load(x_tile + k0, mask=left[None, :], other=0.0)
        if TMA:
            b = tl.reshape(w.load([e, 0, n0, k0]), (2 * BN, BK)).T
        elif D % BK == 0:
            b = tl.load(w_tile + k0)
        else:
            b = tl.load(w_tile + k0, mask=left[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["slots"])
def _down_gradient(
    grad, w, row_slot, weights, offsets, tile_expert, tile_row, tile_count, z, dz, ya, partial, slots,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    VARIANT: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same grid as _up; partial[n, row] is column tile n's part of the routing gradient."""
    NN: tl.constexpr = (F + BN - 1) // BN
    if PERSISTENT:
        for q in tl.range(tl.program_id(0), tl.load(tile_count) * NN, tl.num_programs(0), flatten=FLATTEN):
            e = tl.load(tile_expert + q // NN)
            first = tl.load(tile_row + q // NN)
            end = tl.load(offsets + e + 1)
            _down_gradient_tile(
                grad, w, row_slot, weights, z, dz, ya, partial, slots, e, first, end, q % NN,
                D, F, K, BM, BN, BK, VARIANT, PRECISION,
            )  # fmt: skip
    else:
        q = tl.program_id(0)
        e = tl.load(tile_expert + q // NN)
        if e < 0:
            return
        first = tl.load(tile_row + q // NN)
        end = tl.load(offsets + e + 1)
        _down_gradient_tile(
            grad, w, row_slot, weights, z, dz, ya, partial, slots, e, first, end, q % NN,
            D, F, K, BM, BN, BK, VARIANT, PRECISION,
        )  # fmt: skip


@triton.jit
def _down_gradient_tile(
    grad, w, row_slot, weights, z, dz, ya, partial, slots, e, first, end, tile,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    VARIANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BM)
    live = r < end - first
    slot = tl.load(row_slot + first + tl.minimum(r, end - first - 1))
    n0 = tile * BN
    acc = _gradient_product(
        grad + (slot // K).to(tl.int64)[:, None] * D, w, e, n0, D, F, BM, BN, BK, VARIANT == "tma", PRECISION
    )
    scale = tl.load(weights + slot).to(tl.float32)
    base = first.to(tl.int64)
    z_tile = z + base * (2 * F) + n0
    dz_tile = dz + base * (2 * F) + n0
    ya_tile = ya + base * F + n0
    H: tl.constexpr = BN // 2
    left, right = column_halves(acc, BM, BN)
    part = _swiglu_gradient(left, scale, z_tile, dz_tile, ya_tile, r, live, F - n0, F, H, F % BN == 0)
    part += _swiglu_gradient(right, scale, z_tile + H, dz_tile + H, ya_tile + H, r, live, F - n0 - H, F, H, F % BN == 0)
    tl.store(partial + slots.to(tl.int64) * tile + first + r, part, mask=live)


@triton.jit
def _gradient_product(
    grad_rows, w, e, n0,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] = grad[tokens] @ w_down[e][:, n0 : n0 + BN]. grad_rows [BM, 1] points at each row's first element."""
    k = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    a_tile = grad_rows + k[None, :]
    if not TMA:
        b_tile = w + e.to(tl.int64) * (D * F) + (k[:, None] * F + n[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        left = k0 + k < D
        a = tl.load(a_tile + k0) if D % BK == 0 else tl.load(a_tile + k0, mask=left[None, :], other=0.0)
        if TMA:
            b = tl.reshape(w.load([e, k0, n0]), (BK, BN))
        elif D % BK == 0 and F % BN == 0:
            b = tl.load(b_tile + k0 * F)
        elif D % BK == 0:
            b = tl.load(b_tile + k0 * F, mask=(n < F)[None, :], other=0.0)
        else:
            b = tl.load(b_tile + k0 * F, mask=left[:, None] & (n < F)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _swiglu_gradient(
    acc, scale, z, dz, ya, r, live, columns, F: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The epilogue for one slice of BN columns, of which `columns` exist; z, dz and ya point at the slice's first gate element.

    acc is the gradient of y before the routing weight. Returns its row sums against y.
    """
    n = tl.arange(0, BN)
    mask = live[:, None]
    if not EVEN:
        mask = mask & (n < columns)[None, :]
    at = r[:, None] * (2 * F) + n[None, :]
    gate = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z + F + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    y = silu * up
    part = tl.sum(acc * y, 1)  # y is zero where nothing was loaded, and acc is finite there
    tl.store(ya + r[:, None] * F + n[None, :], (y * scale[:, None]).to(ya.dtype.element_ty), mask=mask)
    acc = acc * scale[:, None]
    tl.store(dz + F + at, (acc * silu).to(dz.dtype.element_ty), mask=mask)
    tl.store(dz + at, (acc * up * (sigmoid + silu * (1.0 - sigmoid))).to(dz.dtype.element_ty), mask=mask)
    return part


@triton.jit(do_not_specialize=["slots"])
def _sum_partials(partial, slot_row, grad, slots, NN: tl.constexpr, B: tl.constexpr):
    """grad[slot] = sum over column tiles, in order, of partial[n, row of slot]."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    r = tl.load(slot_row + i, mask=i < slots, other=-1)
    total = tl.zeros((B,), tl.float32)
    for n in tl.static_range(NN):
        total += tl.load(partial + n * slots.to(tl.int64) + r, mask=r >= 0, other=0.0)
    tl.store(grad + i, total.to(grad.dtype.element_ty), mask=i < slots)


_op = define("triton", _forward, _backward)


_TILE_TYPES = dict.fromkeys(("row_slot", "offsets", "tile_expert", "tile_row", "tile_count"), "*i32")


def _up_case(entry: Entry) -> AotCase:
    config, kind = entry.config, configs.operand_type(entry.fp32)
    types = dict.fromkeys(("x", "w", "z", "y"), f"*{kind}") | _TILE_TYPES
    if config.variant == "tma":
        types["w"] = f"tensordesc<{kind}[1,2,{config.block_n},{config.block_k}]>"
    piped = 0 if entry.fp32 else 3 if config.variant == "pointer" else 2
    return AotCase(entry.label, _up, types, _flagship(config), config.warps, config.stages, entry.archs, piped)


def _da_case(entry: Entry) -> AotCase:
    config, kind = entry.config, configs.operand_type(entry.fp32)
    types = dict.fromkeys(("grad", "w", "z", "dz", "ya"), f"*{kind}") | _TILE_TYPES
    types |= {"weights": "*fp32", "partial": "*fp32", "slots": "i32"}
    if config.variant == "tma":
        types["w"] = f"tensordesc<{kind}[1,{config.block_k},{config.block_n}]>"
    piped = 0 if entry.fp32 else 2
    return AotCase(entry.label, _down_gradient, types, _flagship(config), config.warps, config.stages, entry.archs, piped)


def _flagship(config: Config) -> dict[str, Any]:
    return _up_constants(config, FLAGSHIP["D"], FLAGSHIP["F"], FLAGSHIP["K"])


def _ds_case(column_tiles: int) -> AotCase:
    types = {"partial": "*fp32", "slot_row": "*i32", "grad": "*fp32", "slots": "i32"}
    constants = {"NN": column_tiles, "B": _DS.block_m}
    return AotCase(f"ds of {column_tiles} tiles", _sum_partials, types, constants, _DS.warps, _DS.stages)


AOT_CASES = [
    *map(_up_case, configs.entries("up")),
    *map(_da_case, configs.entries("da")),
    *map(_ds_case, sorted({cdiv(FLAGSHIP["F"], entry.config.block_n) for entry in configs.entries("da")})),
]
