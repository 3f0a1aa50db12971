"""`linear_cross_entropy` with Triton between the library's matrix products: statistics of a chunk of logits, then its gradient.

n tokens of a chunk, V vocabulary rows held here. Each logit is read once for the statistics, and read and overwritten once for the
gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import MAX_ROWS, require
from moe_kernels.configs import Config
from moe_kernels.cross_entropy.with_torch import Kernels, Sharding, run
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.types import Reduce


@triton.jit(do_not_specialize=["n"])
def _stats(logits, row, out, n, V: tl.constexpr, BLOCK: tl.constexpr):
    """out [4, n]: max, sum of exp(logit - max), the target's logit (0 if not held here), 1 if held here. A program per token."""
    t = tl.program_id(0).to(tl.int64)
    base = logits + t * V
    c = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        v = tl.load(base + start + c, mask=start + c < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(v, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(v - higher), 0)
        largest = higher
    target = tl.load(row + t)
    held = target >= 0
    out += t
    tl.store(out, largest)
    tl.store(out + n, total)
    tl.store(out + n + n, tl.load(base + target, mask=held, other=0.0).to(tl.float32))
    tl.store(out + n + n + n, held.to(tl.float32))


@triton.jit
def _grad(logits, row, log_sum, coef, V: tl.constexpr, BLOCK: tl.constexpr):
    """logits <- coef * (softmax - onehot); each element is read and written by the same thread."""
    t = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + t.to(tl.int64) * V + c
    v = tl.load(at, mask=c < V, other=0.0).to(tl.float32)
    p = tl.exp(v - tl.load(log_sum + t)) - tl.where(c == tl.load(row + t), 1.0, 0.0)
    tl.store(at, (p * tl.load(coef + t)).to(logits.dtype.element_ty), mask=c < V)


def _config(vocab: int) -> Config:
    return Config(block_m=1, block_n=min(power_of_2(vocab), 4096), block_k=1, warps=8, stages=3)


def _constants(vocab: int) -> dict[str, int]:
    return {"V": vocab, "BLOCK": _config(vocab).block_n}


@torch.library.custom_op("moe_kernels::cross_entropy_stats_triton", mutates_args=())
def _stats_op(logits: Tensor, row: Tensor) -> Tensor:
    tokens, vocab = logits.shape
    out = empty((4, tokens), torch.float32, logits.device)
    launch(_stats, tokens, _config(vocab), logits, row, out, tokens, **_constants(vocab))
    return out


@_stats_op.register_fake
def _(logits: Tensor, row: Tensor) -> Tensor:
    return logits.new_empty(4, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("moe_kernels::cross_entropy_grad_triton_", mutates_args=("logits",))
def _grad_op(logits: Tensor, row: Tensor, log_sum: Tensor, coef: Tensor) -> None:
    tokens, vocab = logits.shape
    config = _config(vocab)
    args = (logits, row, log_sum.contiguous(), coef.contiguous())
    launch(_grad, (tokens, cdiv(vocab, config.block_n)), config, *args, **_constants(vocab))


def _statistics(logits: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return logits, _stats_op(logits, row)


def _gradient(logits: Tensor, row: Tensor, largest: Tensor, log_sum: Tensor, coef: Tensor) -> Tensor:
    _grad_op(logits, row, log_sum, coef)
    return logits


_KERNELS = Kernels(_statistics, _gradient)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    coef: Tensor,
    *,
    reduce: Reduce | None = None,
    vocab_start: int = 0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moe_kernels.cross_entropy.reference.linear_cross_entropy`; fp64, and T or V above 2^30, raise KernelError."""
    configs.require_supported("linear_cross_entropy", x)
    ok = x.shape[:1].numel() <= MAX_ROWS and w.shape[:1].numel() <= MAX_ROWS
    rule = "the triton backend takes T and V up to 2^30 (else use the torch backend)"
    require(ok, "linear_cross_entropy", rule, x=x, w=w)
    return run(_KERNELS, x, w, target, coef, Sharding(vocab_start, reduce), chunk)


_TYPES = {"logits": "*bf16", "row": "*i64", "out": "*fp32", "log_sum": "*fp32", "coef": "*fp32", "n": "i32"}
AOT_CASES = [
    AotCase(
        name=f"cross_entropy {kernel.__name__} V={vocab}",
        kernel=kernel,
        types={name: _TYPES[name] for name in kernel.arg_names if name in _TYPES},
        constexprs=_constants(vocab),
        num_warps=_config(vocab).warps,
        num_stages=_config(vocab).stages,
    )
    for kernel in (_stats, _grad)
    for vocab in (96_512, 50_257)
]
