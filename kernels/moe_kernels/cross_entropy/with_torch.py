"""`linear_cross_entropy` on any device: chunks of tokens, gradients in forward, the weight gradient accumulated in fp32.

The Triton backend runs the same loop with its own two kernels: see `Kernels`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels.cross_entropy.reference import check_arguments, check_targets
from moe_kernels.types import Reduce


class Kernels(NamedTuple):
    """What is done to one chunk of logits [n, V]. `row` is the target's row of this shard, -1 where another shard holds it."""

    # (logits, row) -> (logits or what replaces them, [4, n]: max, sum of exp(logit - max), the target's logit, 1 if held here)
    stats: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    # (what stats returned, row, max, log of the sum over all shards, coef) -> coef * (softmax - onehot), in place
    grad: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Sharding(NamedTuple):
    """The part of the vocabulary held here, and how the shards are combined."""

    start: int
    reduce: Reduce | None


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
    """See `moe_kernels.cross_entropy.reference.linear_cross_entropy`."""
    return run(TORCH, x, w, target, coef, Sharding(vocab_start, reduce), chunk)


def run(
    kernels: Kernels, x: Tensor, w: Tensor, target: Tensor, coef: Tensor, shard: Sharding, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Check, choose the chunk, and go over it with `kernels`."""
    check_arguments(x, w, target, coef, shard.start, chunk)
    if shard.reduce is None and shard.start == 0 and target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_targets(target, coef, w.shape[0])
    need_grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return _LinearCrossEntropy.apply(x, w, target, coef, kernels, shard, chunk or default_chunk(w), need_grad)


def default_chunk(w: Tensor) -> int:
    """Tokens per chunk: logits of 1.6 GB on a GPU, where each chunk passes over the weight gradient; of 128 MB on a CPU."""
    budget, fewest = (2**27, 256) if w.device.type == "cpu" else (1_600_000_000, 4096)
    return max(budget // (w.shape[0] * w.element_size()), fewest)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        target: Tensor,
        coef: Tensor,
        kernels: Kernels,
        shard: Sharding,
        chunk: int,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        coef = coef.to(wide)
        held = (target >= shard.start) & (target < shard.start + w.shape[0])
        row = torch.where(held, target - shard.start, -1)
        token_loss = torch.empty_like(coef)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad else None
        dw = None
        for begin in range(0, x.shape[0], chunk):
            part = slice(begin, begin + chunk)
            logits, stats = kernels.stats(x[part] @ w.t(), row[part])
            log_sum, token_loss[part] = _losses(stats, coef[part], shard.reduce)
            if dx is not None:
                slope = kernels.grad(logits, row[part], stats[0], log_sum, coef[part]).to(x.dtype)
                torch.mm(slope, w, out=dx[part])
                dw = _accumulate(dw, slope, x[part], wide)
        if need_grad:
            dw = torch.zeros_like(w) if dw is None else dw.to(w.dtype)
            ctx.save_for_backward(dx, dw)
        loss = (coef * token_loss).sum()
        ctx.mark_non_differentiable(token_loss)
        return loss, token_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        need = ctx.needs_input_grad
        return _scale(dx, grad) if need[0] else None, _scale(dw, grad) if need[1] else None, None, None, None, None, None, None


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    # one dimension, not none: else the fp32 factor would be rounded to x's dtype before the product
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x))


def _losses(stats: Tensor, coef: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor]:
    """The log of the summed exponentials and the token losses [n] of a chunk, over all shards."""
    largest, sums = stats[0], stats[1:]
    if reduce is not None:
        largest = reduce.max(stats[0].clone())
        sums = reduce.sum(torch.cat([sums[:1] * (stats[0] - largest).exp(), sums[1:]]))
    log_sum = largest + sums[0].log()
    token_loss = torch.where(sums[2] == 1, log_sum - sums[1], torch.nan)  # a target that no shard holds must not pass silently
    return log_sum, token_loss.masked_fill(coef == 0, 0)


def _accumulate(dw: Tensor | None, slope: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """dw + slope' x in the wide dtype."""
    if x.dtype == wide:
        return slope.t() @ x if dw is None else dw.addmm_(slope.t(), x)
    if x.is_cuda:
        if dw is None or torch.compiler.is_compiling():  # Inductor cannot lower addmm with out_dtype
            part = torch.mm(slope.t(), x, out_dtype=wide)
            return part if dw is None else dw.add_(part)
        return torch.addmm(dw, slope.t(), x, out_dtype=wide, out=dw)
    part = (slope.t() @ x).to(wide)  # CPU products of 16-bit operands have no wider output
    return part if dw is None else dw.add_(part)


def _stats(logits: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces the logits by exp(logit - max): the gradient then needs no second exponential."""
    work = logits if logits.dtype == torch.float64 else logits.float()
    held = row >= 0
    chosen = torch.where(held, work.gather(1, row.clamp_min(0)[:, None])[:, 0], 0)
    largest = work.amax(1)
    work.sub_(largest[:, None]).exp_()
    return work, torch.stack([largest, work.sum(1), chosen, held.to(work.dtype)])


def _grad(work: Tensor, row: Tensor, largest: Tensor, log_sum: Tensor, coef: Tensor) -> Tensor:
    work.mul_((coef * (largest - log_sum).exp())[:, None])
    work.scatter_add_(1, row.clamp_min(0)[:, None], torch.where(row >= 0, -coef, 0)[:, None])
    return work


TORCH = Kernels(_stats, _grad)
