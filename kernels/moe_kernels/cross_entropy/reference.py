"""The loss of a language model's head, without its logits. Shapes: T tokens, D hidden, V vocabulary rows held here.

Cost: 6 T V D FLOP with gradients (three products), 2 T V D without. T=16,384, V=96,512, D=1280: 12.1 TFLOP: A100 39 ms, H100
and H200 12 ms at peak. Bytes: the logits of a chunk pass through memory six times in bf16 (19 GB in all: A100 9.3 ms, H100 5.7
ms, H200 4.0 ms) and the fp32 weight gradient (494 MB) once or twice per chunk.

Saved for backward: the gradients of x and w themselves. Full logits, [T, V], never exist: they would be 3.2 GB in bf16.
"""

import torch
from torch import Tensor

from moe_kernels.checks import FLOATS, require
from moe_kernels.errors import KernelError
from moe_kernels.types import Reduce


def check_arguments(x: Tensor, w: Tensor, target: Tensor, coef: Tensor, vocab_start: int, chunk: int | None) -> None:
    """Raise KernelError where `linear_cross_entropy` cannot take these arguments."""
    op = "linear_cross_entropy"
    ok = x.ndim == 2 and w.ndim == 2 and x.shape[1] == w.shape[1] and x.dtype == w.dtype and x.dtype in FLOATS
    require(ok and x.device == w.device, op, "x [T, D] and w [V, D] must have one floating dtype and one device", x=x, w=w)
    require(w.shape[0] >= 1, op, "w holds no vocabulary row: give every shard at least one", w=w)
    for name, value in (("target", target), ("coef", coef)):
        ok = tuple(value.shape) == (x.shape[0],) and value.device == x.device
        require(ok, op, f"{name} must be [T] on x's device, where x is [T, D]", **{name: value}, x=x)
    require(target.dtype == torch.int64, op, "target must be int64 (use target.long())", target=target)
    require(coef.dtype in FLOATS, op, "coef must be floating", coef=coef)
    rule = "coef must be constant, since forward already computes the gradients with it: use coef.detach()"
    require(not coef.requires_grad, op, rule, coef=coef)
    require(vocab_start >= 0, op, "vocab_start must not be negative", vocab_start=vocab_start)
    require(chunk is None or chunk >= 1, op, "chunk must be at least 1 token, or None", chunk=chunk)


def check_targets(target: Tensor, coef: Tensor, vocab: int) -> None:
    """Raise KernelError where a counted token's target is no row of a vocabulary of `vocab`. Syncs with the host on CUDA."""
    wrong = (coef != 0) & ((target < 0) | (target >= vocab))
    if wrong.any():
        token = int(wrong.nonzero()[0, 0])
        raise KernelError(
            f"linear_cross_entropy: target[{token}] = {int(target[token])} is outside of the vocabulary 0..{vocab - 1}; "
            "a token to be ignored needs coef 0"
        )


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
    """Cross entropy of the logits x w' against `target`, summed with a coefficient per token.

    x [T, D] and w [V, D] of one dtype, target [T] int64, coef [T] fp32 -> (loss [], token_loss [T]), both fp32 (fp64 for fp64
    x). loss = sum over t of coef[t] * token_loss[t]; token_loss is detached. A token with coef 0 is ignored: its target may be
    any value (-100 too) and its token_loss is 0. Gradients of `loss` to x and w; the backends compute them in forward, hence
    the constant coef, and scale them by the gradient of `loss` in backward. `chunk` is the number of tokens whose logits exist
    at a time.

    Vocabulary parallel: w holds the rows [vocab_start, vocab_start + V) of the whole vocabulary and `reduce` combines [n]
    maxima and [3, n] sums over the shards, chunk by chunk, so all shards must pass the same tokens and chunk. Each shard then
    returns the same loss, the gradient of its own rows of w, and **its part of the gradient of x: the caller sums x's gradient
    over the shards**, as the backward of gathering or broadcasting x to them does anyway.

    A counted token whose target no shard holds gives a NaN loss; on the CPU without `reduce` it raises KernelError, as do
    shapes or dtypes that do not agree and a coef that requires a gradient.
    """
    check_arguments(x, w, target, coef, vocab_start, chunk)
    if reduce is None and vocab_start == 0 and target.device.type == "cpu":
        check_targets(target, coef, w.shape[0])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = x.to(wide) @ w.to(wide).T
    columns = torch.arange(w.shape[0], device=w.device) + vocab_start
    hit = target[:, None] == columns
    constant = logits.detach()
    largest = constant.amax(1)
    if reduce is not None:
        largest = reduce.max(largest)
    sums = torch.stack([(constant - largest[:, None]).exp().sum(1), (constant * hit).sum(1), hit.sum(1).to(wide)])
    if reduce is not None:
        sums = reduce.sum(sums)
    log_sum = largest + sums[0].log()
    ignored = coef == 0
    token_loss = torch.where(sums[2] == 1, log_sum - sums[1], torch.nan).masked_fill(ignored, 0)
    # d token_loss / d logits = softmax - onehot: with the softmax as a constant, a linear function of the logits has this
    # gradient
    slope = (constant - log_sum[:, None]).exp() - hit.to(wide)
    linear = (slope * logits).sum(1).masked_fill(ignored, 0)
    coef = coef.to(wide)
    return (coef * (token_loss + linear - linear.detach())).sum(), token_loss
