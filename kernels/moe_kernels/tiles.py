"""Device functions that several kernels share."""

# mypy: allow-untyped-defs, no-check-untyped-defs
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation. PRECISION ("ieee", "tf32") matters for fp32 operands only."""
    if INTERPRETED:  # the interpreter multiplies the raw bits of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def column_halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] -> its left and right half. An epilogue that works on halves needs half the registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def longest_first(offsets, position, E: tl.constexpr, EP: tl.constexpr):
    """The expert with the `position`-th most rows (the lower number first among equals). EP: the power of two at or above E.

    Programs that loop over an expert's rows start in this order, so that the longest loop does not begin last.
    """
    e = tl.arange(0, EP)
    live = e < E
    rows = tl.load(offsets + e + 1, mask=live, other=0) - tl.load(offsets + e, mask=live, other=0)
    rows = tl.where(live, rows, -1)
    ahead = (rows[None, :] > rows[:, None]) | ((rows[None, :] == rows[:, None]) & (e[None, :] < e[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    return tl.sum(tl.where(rank == position, e, 0), 0)
