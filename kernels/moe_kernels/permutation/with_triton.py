"""The permutation ops as Triton kernels; signatures are documented in reference.py.

Sorting is counting: a histogram of each block of slots, a prefix over the blocks, and a stable placement by rank. No atomics, no
argsort, and grids that depend on shapes only. T tokens, K choices, E experts, M = T * K slots, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import check_expert_ids, check_permute, check_unpermute
from moe_kernels.configs import FLAGSHIP, Config, Entry
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.permutation.op import define
from moe_kernels.types import Plan, TileMap

# A block of 256 slots spills (its rank triangle is a block x block comparison), and so does one of 128 with 4 warps in Triton 3.6;
# 32 experts at a time bound the registers for any E.
_SORT = Config(block_m=128, block_n=32, block_k=1024, warps=8, stages=1)
_SPLIT = Config(block_m=4, block_n=256, block_k=1, warps=4, stages=1)
_COPY = Config(block_m=4, block_n=256, block_k=1, warps=4, stages=1)


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> Plan:
    """Group the slots by expert, stably, and map the output tiles of a grouped GEMM."""
    check_expert_ids("sort_by_expert", expert_ids, num_experts)
    configs.require_supported("sort_by_expert", expert_ids)
    block_rows = configs.plan_block_rows(expert_ids.numel(), num_experts, expert_ids.device)
    offsets, row_slot, slot_row, expert, row, count = _sort(expert_ids, num_experts, block_rows)
    return Plan(offsets, row_slot, slot_row, TileMap(expert, row, count, block_rows))


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token to the rows of its slots: [T, D] -> [M, D]."""
    check_permute(x, plan)
    configs.require_supported("permute", x)
    return _ops.permute(x, *plan[:3])


def unpermute(rows: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    """Weighted sum of each token's rows, k = 0..K-1, in fp32: [M, D] -> [T, D]."""
    check_unpermute(rows, plan, weights)
    configs.require_supported("unpermute", rows)
    return _ops.unpermute(rows, *plan[:3], weights)


def tile_bound(slots: int, num_experts: int, block_rows: int) -> int:
    """An upper bound on the sum over experts of ceil(rows / block_rows), whatever the routing."""
    return (slots + min(num_experts, slots) * (block_rows - 1)) // block_rows


def sort_slots(ids: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor, TileMap]:
    """offsets, row_slot, slot_row and the tile map of a Plan, in three launches."""
    offsets, row_slot, slot_row, expert, row, count = _sort_impl(ids, num_experts, block_rows)
    return offsets, row_slot, slot_row, TileMap(expert, row, count, block_rows)


def map_tiles(offsets: Tensor, slots: int, block_rows: int) -> TileMap:
    """The tile map of a sorted batch for another number of rows per tile."""
    num_experts = offsets.shape[0] - 1
    bound = tile_bound(slots, num_experts, block_rows)
    expert, row, count = (empty((n,), torch.int32, offsets.device) for n in (bound, bound, 1))
    constants = _sort_constants(num_experts) | {"BM": block_rows}
    launch(_map_tiles, max(cdiv(bound, _SORT.block_m), 1), _SORT, offsets, expert, row, count, bound, **constants)
    return TileMap(expert, row, count, block_rows)


def sum_rows(rows: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over k in order of weights[t, k] * rows[slot_row[t, k]], accumulated in fp32."""
    tokens, top_k = slot_row.shape
    width = rows.shape[1]
    config = configs.pick("combine", rows)
    out = empty((tokens, width), rows.dtype, rows.device)
    scale = slot_row if weights is None else weights
    grid = (cdiv(tokens, config.block_m), cdiv(width, config.block_n))
    constants = {"D": width, "K": top_k, "BM": config.block_m, "BN": config.block_n, "WEIGHTED": weights is not None}
    launch(_sum_rows, grid, config, rows, slot_row, scale, out, tokens, **constants)
    return out


def copy_rows(x: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    """rows[r] = x[row_slot[r] // K] for the rows before offsets[E]."""
    slots, width = row_slot.shape[0], x.shape[1]
    rows = empty((slots, width), x.dtype, x.device)
    grid = (cdiv(slots, _COPY.block_m), cdiv(width, _COPY.block_n))
    constants = {"D": width, "K": slot_row.shape[1], "E": offsets.shape[0] - 1, "BM": _COPY.block_m, "BN": _COPY.block_n}
    launch(_copy_rows, grid, _COPY, x, offsets, row_slot, rows, **constants)
    return rows


def split_rows(
    grad: Tensor, rows: Tensor, offsets: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_rows: for rows, grad of the token times the slot's weight; for weights, grad . row."""
    tokens, top_k = slot_row.shape
    width = rows.shape[1]
    grad_rows, grad_weights = empty(rows.shape, rows.dtype, rows.device), empty(weights.shape, weights.dtype, weights.device)
    constants = {"D": width, "K": top_k, "BM": _SPLIT.block_m, "BN": _SPLIT.block_n}
    grid = (cdiv(tokens, _SPLIT.block_m), top_k)
    launch(_split_rows, grid, _SPLIT, grad, rows, slot_row, weights, grad_rows, grad_weights, tokens, **constants)
    return grad_rows, grad_weights


def _sort_impl(ids: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, device = ids.numel(), ids.device
    blocks = cdiv(slots, _SORT.block_m)
    bound = tile_bound(slots, num_experts, block_rows)
    counts, totals, offsets, row_slot, slot_row, expert, row, count = (
        empty(shape, torch.int32, device)
        for shape in ((num_experts, blocks), (num_experts,), (num_experts + 1,), (slots,), ids.shape, (bound,), (bound,), (1,))
    )
    constants = _sort_constants(num_experts)
    launch(_count_slots, blocks, _SORT, ids, counts, slots, blocks, **constants)
    launch(_prefix_blocks, num_experts, _SORT, counts, totals, blocks, B=min(_SORT.block_k, power_of_2(blocks, 16)))
    programs = max(blocks, cdiv(bound, _SORT.block_m), 1)
    out = (offsets, row_slot, slot_row, expert, row, count)
    launch(_place_slots, programs, _SORT, ids, counts, totals, *out, slots, blocks, bound, **constants, BM=block_rows)
    return out


def _sort_constants(num_experts: int) -> dict[str, int]:
    return {"E": num_experts, "BE": min(_SORT.block_n, power_of_2(num_experts, 16)), "B": _SORT.block_m}


@triton.jit(do_not_specialize=["slots", "blocks"])
def _count_slots(ids, counts, slots, blocks, E: tl.constexpr, BE: tl.constexpr, B: tl.constexpr):
    """counts[e, b] = slots of block b that chose expert e. One program per block."""
    block = tl.program_id(0)
    i = block * B + tl.arange(0, B)
    chosen = tl.load(ids + i, mask=i < slots, other=-1)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        count = tl.sum((chosen[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts + e.to(tl.int64) * blocks + block, count, mask=e < E)


@triton.jit(do_not_specialize=["blocks"])
def _prefix_blocks(counts, totals, blocks, B: tl.constexpr):
    """In place: counts[e, :] becomes its exclusive prefix over blocks, and totals[e] its sum. One program per expert."""
    e = tl.program_id(0)
    row = counts + e.to(tl.int64) * blocks
    before = 0
    for first in range(0, blocks, B):
        b = first + tl.arange(0, B)
        count = tl.load(row + b, mask=b < blocks, other=0)
        tl.store(row + b, before + tl.cumsum(count, 0) - count, mask=b < blocks)
        before += tl.sum(count, 0)
    tl.store(totals + e, before)


@triton.jit(do_not_specialize=["slots", "blocks", "bound"])
def _place_slots(
    ids, counts, totals, offsets, row_slot, slot_row, tile_expert, tile_row, tile_count, slots, blocks, bound,
    E: tl.constexpr, BE: tl.constexpr, B: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Give each slot its row: the expert's first row, plus its slots in earlier blocks, plus its rank in this block (an equality
    triangle, so the order is stable). Every program repeats the prefix over experts, which is cheaper than a launch of its own."""
    block = tl.program_id(0)
    i = block * B + tl.arange(0, B)
    chosen = tl.load(ids + i, mask=i < slots, other=-1)
    j = tl.arange(0, B)
    earlier = (chosen[:, None] == chosen[None, :]) & (j[None, :] < j[:, None])
    row = tl.sum(earlier.to(tl.int32), 1)
    rows = 0
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        count = tl.load(totals + e, mask=e < E, other=0)
        end = rows + tl.cumsum(count, 0)
        row += tl.sum(tl.where(chosen[:, None] == e[None, :], (end - count)[None, :], 0), 1)
        if block == 0:
            tl.store(offsets + 1 + e, end, mask=e < E)
        rows += tl.sum(count, 0)
    if block == 0:
        tl.store(offsets, 0)
    live = (chosen >= 0) & (chosen < E)
    row += tl.load(counts + tl.where(live, chosen, 0).to(tl.int64) * blocks + block, mask=live, other=0)
    tl.store(row_slot + row, i, mask=live)
    tl.store(slot_row + i, tl.where(live, row, -1), mask=i < slots)
    _write_tiles(totals, tile_expert, tile_row, tile_count, bound, E, BE, B, BM, False)


@triton.jit(do_not_specialize=["bound"])
def _map_tiles(
    offsets, tile_expert, tile_row, tile_count, bound,
    E: tl.constexpr, BE: tl.constexpr, B: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    _write_tiles(offsets, tile_expert, tile_row, tile_count, bound, E, BE, B, BM, True)


@triton.jit
def _write_tiles(
    counts, tile_expert, tile_row, tile_count, bound,
    E: tl.constexpr, BE: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Entries [pid * B, pid * B + B) of the tile map. counts: rows per expert, or with PREFIX their exclusive prefix [E + 1]."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    expert = tl.zeros((B,), tl.int32)
    row = tl.zeros((B,), tl.int32)
    tiles = 0
    rows = 0
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        count = tl.load(counts + e, mask=e < E, other=0)
        if PREFIX:
            count = tl.load(counts + e + 1, mask=e < E, other=0) - count
        needed = (count + BM - 1) // BM
        first_tile = tiles + tl.cumsum(needed, 0) - needed
        first_row = rows + tl.cumsum(count, 0) - count
        mine = (t[:, None] >= first_tile[None, :]) & (t[:, None] < (first_tile + needed)[None, :])
        expert += tl.sum(tl.where(mine, e[None, :], 0), 1)
        row += tl.sum(tl.where(mine, (first_row - first_tile * BM)[None, :] + t[:, None] * BM, 0), 1)
        tiles += tl.sum(needed, 0)
        rows += tl.sum(count, 0)
    tl.store(tile_expert + t, tl.where(t < tiles, expert, -1), mask=t < bound)
    tl.store(tile_row + t, row, mask=t < bound)
    if tl.program_id(0) == 0:
        tl.store(tile_count, tiles)


@triton.jit
def _copy_rows(
    x, offsets, row_slot, rows,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """rows[r] = x[row_slot[r] // K] for r < offsets[E]."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    live = r < tl.load(offsets + E)
    mask = live[:, None] & (d < D)[None, :]
    token = (tl.load(row_slot + r, mask=live, other=0) // K).to(tl.int64)
    value = tl.load(x + token[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(rows + r.to(tl.int64)[:, None] * D + d[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _sum_rows(
    rows, slot_row, weights, out, tokens,
    D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k = 0..K-1, in this order, of weights[t, k] * rows[slot_row[t, k]]; empty slots are skipped."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    slot = t.to(tl.int64) * K
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.static_range(K):
        r = tl.load(slot_row + slot + k, mask=t < tokens, other=-1)
        mask = (r >= 0)[:, None] & (d < D)[None, :]
        value = tl.load(rows + r.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + slot + k, mask=r >= 0, other=0.0).to(tl.float32)[:, None]
        total += value
    mask = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _split_rows(
    grad, rows, slot_row, weights, grad_rows, grad_weights, tokens,
    D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad_rows[r] = weights[slot] * grad[token] and grad_weights[slot] = grad[token] . rows[r], for slot k = program_id(1)."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    slot = t.to(tl.int64) * K + tl.program_id(1)
    r = tl.load(slot_row + slot, mask=t < tokens, other=-1)
    live = r >= 0
    scale = tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)
    from_ = t.to(tl.int64)[:, None] * D
    to = r.to(tl.int64)[:, None] * D
    dot = tl.zeros((BM,), tl.float32)
    for first in range(0, D, BN):
        d = first + tl.arange(0, BN)
        mask = live[:, None] & (d < D)[None, :]
        g = tl.load(grad + from_ + d[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(rows + to + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(g * v, 1)
        tl.store(grad_rows + to + d[None, :], (g * scale[:, None]).to(grad_rows.dtype.element_ty), mask=mask)
    tl.store(grad_weights + slot, dot.to(grad_weights.dtype.element_ty), mask=t < tokens)


_sort = torch.library.custom_op("moe_kernels::sort_by_expert_triton", _sort_impl, mutates_args=())


@_sort.register_fake
def _fake_sort(ids: Tensor, num_experts: int, block_rows: int) -> tuple[Tensor, ...]:
    slots = ids.shape[0] * ids.shape[1]
    bound = tile_bound(slots, num_experts, block_rows)
    return tuple(ids.new_empty(n) for n in (num_experts + 1, slots, ids.shape, bound, bound, 1))


_ops = define("triton", copy_rows, sum_rows, split_rows)


def _combine_case(entry: Entry, weighted: bool) -> AotCase:
    kind, scale = "*fp32" if entry.fp32 else "*bf16", "*fp32" if weighted else "*i32"
    types = {"rows": kind, "slot_row": "*i32", "weights": scale, "out": kind, "tokens": "i32"}
    config = entry.config
    constants = {"D": FLAGSHIP["D"], "K": FLAGSHIP["K"], "BM": config.block_m, "BN": config.block_n, "WEIGHTED": weighted}
    name = entry.label if weighted else entry._replace(op="sum").label
    return AotCase(name, _sum_rows, types, constants, config.warps, config.stages, entry.archs)


def _sort_case(name: str, kernel: Any, pointers: str, scalars: str, **constants: int) -> AotCase:
    types = dict.fromkeys(pointers.split(), "*i32") | dict.fromkeys(scalars.split(), "i32")
    return AotCase(name, kernel, types, constants, _SORT.warps, _SORT.stages)


def _sort_cases(num_experts: int) -> list[AotCase]:
    constants = _sort_constants(num_experts)
    tile = "tile_expert tile_row tile_count"
    return [
        _sort_case(f"count E{num_experts}", _count_slots, "ids counts", "slots blocks", **constants),
        _sort_case(
            f"place E{num_experts}", _place_slots, f"ids counts totals offsets row_slot slot_row {tile}", "slots blocks bound",
            **constants, BM=128,
        ),
        _sort_case(f"map E{num_experts}", _map_tiles, f"offsets {tile}", "bound", **constants, BM=128),
    ]  # fmt: skip


def _row_cases() -> list[AotCase]:
    copy = {"D": 1280, "K": 4, "E": 16, "BM": _COPY.block_m, "BN": _COPY.block_n}
    split = {"D": 1280, "K": 4, "BM": _SPLIT.block_m, "BN": _SPLIT.block_n}
    split_types = {"slot_row": "*i32", "weights": "*fp32", "grad_rows": "*bf16", "grad_weights": "*fp32", "tokens": "i32"}
    copy_types = {"x": "*bf16", "offsets": "*i32", "row_slot": "*i32", "rows": "*bf16"}
    return [
        AotCase("copy", _copy_rows, copy_types, copy, _COPY.warps, _COPY.stages),
        AotCase("split", _split_rows, {"grad": "*bf16", "rows": "*bf16", **split_types}, split, _SPLIT.warps, _SPLIT.stages),
    ]


AOT_CASES = [
    *_sort_cases(16),
    *_sort_cases(256),
    _sort_case("prefix", _prefix_blocks, "counts totals", "blocks", B=512),
    *_row_cases(),
    *(_combine_case(entry, weighted) for entry in configs.entries("combine") for weighted in (True, False)),
]
