"""The last step of every reduction over tokens: sum partial results in an order that depends on their number alone.

A kernel that reduces over tokens splits them into ranges (a function of the token count, never of the device) and writes one
partial per range. Floating atomics would give other bits on every run.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.configs import Config
from moe_kernels.launch import cdiv, empty, launch

_CONFIG = Config(block_m=256, block_n=32, block_k=1, warps=8, stages=3)  # block_m partials of block_n columns at a time
_TILE = {"ROWS": _CONFIG.block_m, "COLUMNS": _CONFIG.block_n}


@triton.jit(do_not_specialize=["count"])
def _sum_partials(partials, out, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[c] = sum over r < count of partials[r, c]."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS)
    total = tl.zeros((COLUMNS,), partials.dtype.element_ty)
    for start in range(0, count, ROWS):
        rows = start + r
        mask = (rows < count)[:, None] & (c < width)[None, :]
        total += tl.sum(tl.load(partials + rows.to(tl.int64)[:, None] * width + c[None, :], mask=mask, other=0), 0)
    tl.store(out + c, total.to(out.dtype.element_ty), mask=c < width)


def range_rows(tokens: int, ranges: int, tile_rows: int) -> int:
    """Tokens of one range where there are at most `ranges`: whole tiles, so that a tile never straddles two ranges."""
    return cdiv(cdiv(tokens, ranges), tile_rows) * tile_rows


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """partials [R, N] fp32 or int32 -> [N] of `dtype`; zeros where R = 0."""
    count, width = partials.shape
    out = empty((width,), dtype, partials.device)
    launch(_sum_partials, cdiv(width, _CONFIG.block_n), _CONFIG, partials, out, count, width, **_TILE)
    return out


AOT_CASES = [
    AotCase(
        name=f"sum_partials {kind}",
        kernel=_sum_partials,
        types={"partials": f"*{kind}", "out": f"*{kind}", "count": "i32", "width": "i32"},
        constexprs=_TILE,
        num_warps=_CONFIG.warps,
        num_stages=_CONFIG.stages,
    )
    for kind in ("fp32", "i32")
]
