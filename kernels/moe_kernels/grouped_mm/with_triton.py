"""grouped_mm as Triton kernels, and the two products that moe_mlp shares; the signature is documented in reference.py.

`rows_product` is the forward pass and the gradient of rows: output tiles of one expert each, expert-major, so that an expert's weights
stay in L2 and a tile of rows is read from memory once. `rows_outer` is the gradient of weights: one program per output tile loops over
its expert's rows in ascending order. No atomics; rows at or after offsets[E] are never read into a sum and never written.

M rows, E experts, C columns in, N columns out.
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import check_grouped_mm
from moe_kernels.configs import FLAGSHIP, Config, Entry
from moe_kernels.grouped_mm.op import define
from moe_kernels.launch import cdiv, empty, grid_size, launch, power_of_2
from moe_kernels.permutation.with_triton import map_tiles
from moe_kernels.tiles import column_halves, dot, longest_first
from moe_kernels.types import Plan, TileMap


def grouped_mm(rows: Tensor, w: Tensor, plan: Plan) -> Tensor:
    """Each expert's rows times its matrix, transposed: rows [M, C], w [E, N, C] -> [M, N]."""
    check_grouped_mm(rows, w, plan)
    configs.require_supported("grouped_mm", rows, w)
    return _op(rows, w, plan)


def rows_product(op: str, rows: Tensor, w: Tensor, offsets: Tensor, transposed: bool, tiles: TileMap | None = None) -> Tensor:
    """out[r] = rows[r] @ w[e]^T (transposed; w [E, N, C]) or rows[r] @ w[e] (w [E, C, N]), with the config of `op`.

    `tiles` is used where it has as many rows per tile as the config, and made where not.
    """
    slots, inner = rows.shape
    columns = w.shape[1 if transposed else 2]
    out = empty((slots, columns), rows.dtype, rows.device)
    if slots == 0:
        return out
    config = configs.pick(op, rows, w, rows_per_expert=slots / w.shape[0])
    if config.specialize and inner % config.block_k:  # its boxes would run into the next expert's weights
        config = replace(config, specialize=False)
    if tiles is None or tiles.block_rows != config.block_m:
        tiles = map_tiles(offsets, slots, config.block_m)
    programs = grid_size(tiles.expert.shape[0] * cdiv(columns, config.block_n), config, rows.device)
    rows_arg, w_arg = _operands(config, rows, w, transposed)
    constants = _product_constants(config, w.shape[0], columns, inner, transposed)
    index = (offsets, tiles.expert, tiles.row, tiles.live)
    launch(_rows_product, programs, config, rows_arg, w_arg, *index, out, slots, **constants)
    return out


def rows_outer(
    op: str, a: Tensor, b: Tensor, offsets: Tensor, row_slot: Tensor | None = None, gather_a: int = 0, gather_b: int = 0
) -> Tensor:
    """dw[e] = sum over the rows r of e of a[r]^T b[r]: a [M, P], b [M, Q] -> [E, P, Q].

    An operand with gather = K > 0 is [T, ...] and is read at token row_slot[r] // K; without one row_slot is not needed.
    """
    num_experts, p, q = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    slots = max(a.shape[0] * max(gather_a, 1), b.shape[0] * max(gather_b, 1))
    row_slot = offsets if row_slot is None else row_slot  # never read, but an argument must be a pointer
    config = configs.pick(op, a, b, rows_per_expert=slots / num_experts)
    dw = empty((num_experts, p, q), a.dtype, a.device)
    if slots == 0:  # a descriptor cannot address a matrix without rows
        return dw.zero_()
    programs = num_experts * cdiv(p, config.block_m) * cdiv(q, config.block_n)
    constants = _outer_constants(config, num_experts, p, q, gather_a, gather_b)
    a_arg: Any = a
    b_arg: Any = b
    if config.variant == "tma":
        a_arg = a if gather_a else TensorDescriptor.from_tensor(a, [config.block_k, config.block_m])
        b_arg = b if gather_b else TensorDescriptor.from_tensor(b, [config.block_k, config.block_n])
    launch(_rows_outer, programs, config, a_arg, b_arg, row_slot, offsets, dw, **constants)
    return dw


def _operands(config: Config, rows: Tensor, w: Tensor, transposed: bool) -> tuple[Any, Any]:
    if config.variant != "tma" or config.specialize:
        return rows, w
    box = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    return (
        TensorDescriptor.from_tensor(rows, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, [1, *box]),
    )


def _product_constants(config: Config, num_experts: int, columns: int, inner: int, transposed: bool) -> dict[str, Any]:
    return {
        "E": num_experts, "N": columns, "C": inner, "TRANSPOSED": transposed,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "TMA": config.variant == "tma",
        "PERSISTENT": config.persistent, "FLATTEN": config.flatten, "SPECIALIZE": config.specialize, "PRECISION": config.precision,
    }  # fmt: skip


def _outer_constants(config: Config, num_experts: int, p: int, q: int, gather_a: int, gather_b: int) -> dict[str, Any]:
    return {
        "E": num_experts, "EP": power_of_2(num_experts), "P": p, "Q": q, "GATHER_A": gather_a, "GATHER_B": gather_b,
        "BP": config.block_m, "BQ": config.block_n, "BR": config.block_k,
        "TMA": config.variant == "tma", "PRECISION": config.precision,
    }  # fmt: skip


def _forward(rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> Tensor:
    return rows_product("down", rows, w, offsets, transposed=True, tiles=tiles)


def _backward(grad: Tensor, rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> tuple[Tensor, Tensor]:
    grad_rows = rows_product("dxe", grad, w, offsets, transposed=False, tiles=tiles)
    return grad_rows, rows_outer("dw", grad, rows, offsets)


@triton.jit(do_not_specialize=["slots"])
def _rows_product(
    rows, w, offsets, tile_expert, tile_row, tile_count, out, slots,
    E: tl.constexpr, N: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """1-D grid over (row tile, column tile), columns fastest.

    rows and w are pointers, or with TMA descriptors. With SPECIALIZE they are pointers to make descriptors of: each consumer group
    takes half of the rows, and the compiler can only halve the box of a descriptor that it saw made.
    """
    NN: tl.constexpr = (N + BN - 1) // BN
    if SPECIALIZE:
        rows = tl.make_tensor_descriptor(rows, [slots, C], [C, 1], [BM, BK])
        if TRANSPOSED:
            w = tl.make_tensor_descriptor(w, [E * N, C], [C, 1], [BN, BK])
        else:
            w = tl.make_tensor_descriptor(w, [E * C, N], [N, 1], [BK, BN])
    if PERSISTENT:
        total = tl.load(tile_count) * NN
        for q in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
            e = tl.load(tile_expert + q // NN)
            first = tl.load(tile_row + q // NN)
            end = tl.load(offsets + e + 1)
            n0 = (q % NN) * BN
            _product_tile(rows, w, out, e, first, end, n0, N, C, TRANSPOSED, BM, BN, BK, TMA, SPECIALIZE, PRECISION)
    else:
        q = tl.program_id(0)
        e = tl.load(tile_expert + q // NN)
        if e < 0:
            return
        first = tl.load(tile_row + q // NN)
        end = tl.load(offsets + e + 1)
        n0 = (q % NN) * BN
        _product_tile(rows, w, out, e, first, end, n0, N, C, TRANSPOSED, BM, BN, BK, TMA, SPECIALIZE, PRECISION)


@triton.jit
def _product_tile(
    rows, w, out, e, first, end, n0,
    N: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if TMA:
        acc = _product_tma(rows, w, e, first, n0, N, C, TRANSPOSED, BM, BN, BK, SPECIALIZE, PRECISION)
    else:
        acc = _product_pointer(rows, w, e, first, end, n0, N, C, TRANSPOSED, BM, BN, BK, PRECISION)
    r = tl.arange(0, BM)
    live = r < end - first
    target = out + first.to(tl.int64) * N + n0
    if SPECIALIZE:  # which cannot partition the split in halves
        _store_columns(acc, target, r, live, N - n0, N, BN, N % BN == 0)
    else:
        left, right = column_halves(acc, BM, BN)
        _store_columns(left, target, r, live, N - n0, N, BN // 2, N % BN == 0)
        _store_columns(right, target + BN // 2, r, live, N - n0 - BN // 2, N, BN // 2, N % BN == 0)


@triton.jit
def _store_columns(value, target, r, live, columns, N: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """Store a tile at `target`, a pointer to its first element in a matrix with N columns of which `columns` are left."""
    n = tl.arange(0, BN)
    mask = live[:, None]
    if not EVEN:
        mask = mask & (n < columns)[None, :]
    tl.store(target + r[:, None] * N + n[None, :], value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _product_tma(
    rows, w, e, first, n0,
    N: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A box may run into the next expert's rows: they are computed and not stored. Past a matrix's end it reads zeros.
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        a = rows.load([first, k])
        if TRANSPOSED:
            b = w.load([e * N + n0, k]).T if SPECIALIZE else tl.reshape(w.load([e, n0, k]), (BN, BK)).T
        else:
            b = w.load([e * C + k, n0]) if SPECIALIZE else tl.reshape(w.load([e, k, n0]), (BK, BN))
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _product_pointer(
    rows, w, e, first, end, n0,
    N: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Rows are clamped to the expert's last row, so that the loop needs no row mask. An index along a contiguous axis is masked and
    # never clamped: a clamp hides the contiguity, and the operand leaves the asynchronous pipeline.
    r = tl.minimum(tl.arange(0, BM), end - first - 1)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_tile = rows + first.to(tl.int64) * C + (r[:, None] * C + k[None, :])
    if TRANSPOSED:
        b_tile = w + e.to(tl.int64) * (N * C) + tl.minimum(n, N - 1)[None, :] * C + k[:, None]
    else:
        b_tile = w + e.to(tl.int64) * (N * C) + n[None, :] + k[:, None] * N
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, C, BK):
        step = k0 if TRANSPOSED else k0 * N
        if C % BK == 0:
            a = tl.load(a_tile + k0)
            b = (
                tl.load(b_tile + step)
                if TRANSPOSED or N % BN == 0
                else tl.load(b_tile + step, mask=(n < N)[None, :], other=0.0)
            )
        else:
            left = k0 + k < C
            a = tl.load(a_tile + k0, mask=left[None, :], other=0.0)
            if TRANSPOSED:
                b = tl.load(b_tile + step, mask=left[:, None], other=0.0)
            else:
                b = tl.load(b_tile + step, mask=left[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _rows_outer(
    a, b, row_slot, offsets, dw,
    E: tl.constexpr, EP: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[e] = sum over the rows of e of a[row]^T b[row]. 1-D grid over (expert, P tile, Q tile), Q fastest; no rows: zeros.

    TMA: operands that are not gathered are descriptors.
    """
    NP: tl.constexpr = (P + BP - 1) // BP
    NQ: tl.constexpr = (Q + BQ - 1) // BQ
    pid = tl.program_id(0)
    e = pid // (NP * NQ)
    if E > 1 and E <= 64:
        e = longest_first(offsets, e, E, EP)
    p0 = (pid % (NP * NQ)) // NQ * BP
    q0 = pid % NQ * BQ
    start = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    if TMA:
        acc = _outer_tma(a, b, row_slot, start, end, p0, q0, P, Q, GATHER_A, GATHER_B, BP, BQ, BR, PRECISION)
    else:
        acc = _outer_pointer(a, b, row_slot, start, end, p0, q0, P, Q, GATHER_A, GATHER_B, BP, BQ, BR, PRECISION)
    p = p0 + tl.arange(0, BP)
    q = q0 + tl.arange(0, BQ)
    target = dw + e.to(tl.int64) * (P * Q) + (p[:, None] * Q + q[None, :])
    tl.store(target, acc.to(dw.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


@triton.jit
def _outer_pointer(
    a, b, row_slot, start, end, p0, q0,
    P: tl.constexpr, Q: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row numbers past the expert's end are clamped to its last row and masked in one operand, which is enough: what is multiplied by
    zero there is a row of the same expert."""
    row = tl.arange(0, BR)
    acc = tl.zeros((BP, BQ), tl.float32)
    for first in range(start, end, BR):
        live = first + row < end
        r = tl.minimum(first + row, end - 1)
        va = _columns_tile(a, _source_row(row_slot, r, GATHER_A), p0, live, P, BP, True)
        vb = _rows_tile(b, _source_row(row_slot, r, GATHER_B), q0, live, Q, BQ, False)
        acc = dot(va, vb, acc, PRECISION)
    return acc


@triton.jit
def _outer_tma(
    a, b, row_slot, start, end, p0, q0,
    P: tl.constexpr, Q: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A box of rows may run past the expert's end, into rows that nothing wrote (0 * NaN): only the last, partial block is masked, and
    there both operands are."""
    row = tl.arange(0, BR)
    acc = tl.zeros((BP, BQ), tl.float32)
    whole = start + (end - start) // BR * BR
    for first in range(start, whole, BR):
        live = row >= 0
        if GATHER_A > 0:
            va = _columns_tile(a, _source_row(row_slot, first + row, GATHER_A), p0, live, P, BP, False)
        else:
            va = a.load([first, p0]).T
        if GATHER_B > 0:
            vb = _rows_tile(b, _source_row(row_slot, first + row, GATHER_B), q0, live, Q, BQ, False)
        else:
            vb = b.load([first, q0])
        acc = dot(va, vb, acc, PRECISION)
    if whole < end:
        live = whole + row < end
        r = tl.minimum(whole + row, end - 1)
        if GATHER_A > 0:
            va = _columns_tile(a, _source_row(row_slot, r, GATHER_A), p0, live, P, BP, True)
        else:
            va = tl.where(live[:, None], a.load([whole, p0]), 0.0).T
        if GATHER_B > 0:
            vb = _rows_tile(b, _source_row(row_slot, r, GATHER_B), q0, live, Q, BQ, True)
        else:
            vb = tl.where(live[:, None], b.load([whole, q0]), 0.0)
        acc = dot(va, vb, acc, PRECISION)
    return acc


@triton.jit
def _columns_tile(a, r, p0, live, P: tl.constexpr, BP: tl.constexpr, MASKED: tl.constexpr):
    """[BP, BR]: columns p0.. of rows r. Loaded transposed, as a transpose in registers would leave the asynchronous pipeline."""
    p = p0 + tl.arange(0, BP)
    tile = a + r[None, :] * P + p[:, None]
    if MASKED:
        if P % BP == 0:
            return tl.load(tile, mask=live[None, :], other=0.0)
        else:
            return tl.load(tile, mask=live[None, :] & (p < P)[:, None], other=0.0)
    else:
        if P % BP == 0:
            return tl.load(tile)
        else:
            return tl.load(tile, mask=(p < P)[:, None], other=0.0)


@triton.jit
def _rows_tile(b, r, q0, live, Q: tl.constexpr, BQ: tl.constexpr, MASKED: tl.constexpr):
    """[BR, BQ]: columns q0.. of rows r."""
    q = q0 + tl.arange(0, BQ)
    tile = b + r[:, None] * Q + q[None, :]
    if MASKED:
        if Q % BQ == 0:
            return tl.load(tile, mask=live[:, None], other=0.0)
        else:
            return tl.load(tile, mask=live[:, None] & (q < Q)[None, :], other=0.0)
    else:
        if Q % BQ == 0:
            return tl.load(tile)
        else:
            return tl.load(tile, mask=(q < Q)[None, :], other=0.0)


@triton.jit
def _source_row(row_slot, r, GATHER: tl.constexpr):
    """Row r itself, or with GATHER = K the token of its slot."""
    if GATHER > 0:
        r = tl.load(row_slot + r) // GATHER
    return r.to(tl.int64)


_op = define("triton", _forward, _backward)


def _product_case(entry: Entry, columns: int, inner: int, transposed: bool) -> AotCase:
    config, kind = entry.config, configs.operand_type(entry.fp32)
    box = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    tma = config.variant == "tma" and not config.specialize
    types = {
        "rows": f"tensordesc<{kind}[{config.block_m},{config.block_k}]>" if tma else f"*{kind}",
        "w": f"tensordesc<{kind}[1,{box[0]},{box[1]}]>" if tma else f"*{kind}",
        "out": f"*{kind}",
        "slots": "i32",
    } | dict.fromkeys(("offsets", "tile_expert", "tile_row", "tile_count"), "*i32")
    constants = _product_constants(config, FLAGSHIP["E"], columns, inner, transposed)
    piped = 0 if entry.fp32 else 2
    return AotCase(entry.label, _rows_product, types, constants, config.warps, config.stages, entry.archs, piped)


def _outer_case(entry: Entry, p: int, q: int, gather_a: int, gather_b: int) -> AotCase:
    config, kind = entry.config, configs.operand_type(entry.fp32)
    types = {"a": f"*{kind}", "b": f"*{kind}", "row_slot": "*i32", "offsets": "*i32", "dw": f"*{kind}"}
    if config.variant == "tma" and not gather_a:
        types["a"] = f"tensordesc<{kind}[{config.block_k},{config.block_m}]>"
    if config.variant == "tma" and not gather_b:
        types["b"] = f"tensordesc<{kind}[{config.block_k},{config.block_n}]>"
    constants = _outer_constants(config, FLAGSHIP["E"], p, q, gather_a, gather_b)
    piped = 0 if entry.fp32 else 2
    return AotCase(entry.label, _rows_outer, types, constants, config.warps, config.stages, entry.archs, piped)


_D, _F, _K = FLAGSHIP["D"], FLAGSHIP["F"], FLAGSHIP["K"]
AOT_CASES = [
    *(_product_case(entry, _D, _F, True) for entry in configs.entries("down")),
    *(_product_case(entry, _D, 2 * _F, False) for entry in configs.entries("dxe")),
    *(
        _product_case(entry._replace(op="mm"), 2 * _F, _D, True)
        for entry in configs.entries("down")
        if entry.kind != "candidate"
    ),
    *(_outer_case(entry, 2 * _F, _D, 0, 0) for entry in configs.entries("dw")),
    *(_outer_case(entry, 2 * _F, _D, 0, _K) for entry in configs.entries("dw1")),
    *(_outer_case(entry, _D, _F, _K, 0) for entry in configs.entries("dw2")),
]
