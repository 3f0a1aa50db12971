"""`topk_scores` in Triton: score, selection, weights and counts in one pass; the block counts are then summed. T tokens, E
experts."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.checks import require
from moe_kernels.configs import Config
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.partial_sums import sum_partials
from moe_kernels.topk.reference import SMALLEST_SUM, Score, check_arguments
from moe_kernels.types import TopK

_SMALLEST_SUM = tl.constexpr(SMALLEST_SUM)
_TAKEN = tl.constexpr(-(2**63))
_MAX_EXPERTS = 1024


@triton.jit
def _order(logits, e, LAST: tl.constexpr):
    """Unique int64 keys that sort like (logit, then the lower id): the bits of the float above the id, see with_torch._best."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (LAST - e).to(tl.int64)


@triton.jit(do_not_specialize=["T"])
def _forward(
    logits,
    scores,
    weights,
    ids,
    counts,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e, k = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    real = (t < T)[:, None]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    mask = real & (e < E)[None, :]
    x = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        p = tl.sigmoid(x)
    else:
        p = tl.exp(x - tl.where(t < T, tl.max(x, 1), 0.0)[:, None])  # a row past T holds -inf only
        p = p / tl.where(t < T, tl.sum(p, 1), 1.0)[:, None]
    tl.store(scores + at, p, mask=mask)
    keys = tl.where(mask, _order(x, e[None, :], EXPERTS - 1), _TAKEN)
    selected = tl.zeros((TOKENS, CHOICES), tl.float32)
    chosen = tl.zeros((TOKENS, CHOICES), tl.int32)
    count = tl.zeros((EXPERTS,), tl.int32)
    for j in tl.static_range(K):
        best = EXPERTS - 1 - (tl.max(keys, 1) & 0xFFFFFFFF).to(tl.int32)
        hit = e[None, :] == best[:, None]
        keys = tl.where(hit, _TAKEN, keys)
        count += tl.sum((hit & mask).to(tl.int32), 0)
        selected = tl.where(k[None, :] == j, tl.sum(tl.where(hit, p, 0.0), 1)[:, None], selected)
        chosen = tl.where(k[None, :] == j, best[:, None], chosen)
    if RENORMALIZE:
        selected = selected / tl.maximum(tl.sum(selected, 1), _SMALLEST_SUM)[:, None]
    slot = t.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(weights + slot, selected, mask=real & (k < K)[None, :])
    tl.store(ids + slot, chosen, mask=real & (k < K)[None, :])
    tl.store(counts + tl.program_id(0) * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["T"])
def _backward(
    scores,
    weights,
    ids,
    dweights,
    dscores,
    dlogits,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e, k = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    mask = (t < T)[:, None] & (e < E)[None, :]
    p = tl.load(scores + at, mask=mask, other=0.0)
    slot = t.to(tl.int64) * K
    direct = tl.zeros((TOKENS, EXPERTS), tl.float32)  # the gradient of the weight of each selected expert
    taken = tl.zeros((TOKENS, EXPERTS), tl.int1)
    for j in tl.static_range(K):
        hit = e[None, :] == tl.load(ids + slot + j, mask=t < T, other=-1)[:, None]
        direct = tl.where(hit, tl.load(dweights + slot + j, mask=t < T, other=0.0)[:, None], direct)
        taken = taken | hit
    if RENORMALIZE:
        choice = (t < T)[:, None] & (k < K)[None, :]
        w = tl.load(weights + slot[:, None] + k[None, :], mask=choice, other=0.0)
        dw = tl.load(dweights + slot[:, None] + k[None, :], mask=choice, other=0.0)
        total = tl.sum(tl.where(taken, p, 0.0), 1)
        mean = tl.where(total >= _SMALLEST_SUM, tl.sum(w * dw, 1), 0.0)
        direct = tl.where(taken, (direct - mean[:, None]) / tl.maximum(total, _SMALLEST_SUM)[:, None], 0.0)
    g = tl.load(dscores + at, mask=mask, other=0.0) + direct
    g = g * p * (1.0 - p) if SIGMOID else p * (g - tl.sum(p * g, 1)[:, None])
    tl.store(dlogits + at, g.to(dlogits.dtype.element_ty), mask=mask)


def _config(num_experts: int) -> Config:
    """Tokens of a program, lanes for the experts."""
    lanes = power_of_2(num_experts, 2)
    return Config(block_m=max(1024 // lanes, 1), block_n=lanes, block_k=1, warps=4, stages=3)


def _constants(num_experts: int, k: int, sigmoid: bool, renormalize: bool) -> dict[str, Any]:
    config = _config(num_experts)
    shape = {"E": num_experts, "K": k, "EXPERTS": config.block_n, "CHOICES": power_of_2(k, 2), "TOKENS": config.block_m}
    return shape | {"SIGMOID": sigmoid, "RENORMALIZE": renormalize}


@torch.library.custom_op("moe_kernels::topk_scores_triton", mutates_args=())
def _topk(logits: Tensor, k: int, sigmoid: bool, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    config, device = _config(experts), logits.device
    programs = cdiv(tokens, config.block_m)
    weights, ids = empty((tokens, k), torch.float32, device), empty((tokens, k), torch.int32, device)
    scores, counts = empty((tokens, experts), torch.float32, device), empty((programs, experts), torch.int32, device)
    args = (logits.contiguous(), scores, weights, ids, counts, tokens)
    launch(_forward, programs, config, *args, **_constants(experts, k, sigmoid, renormalize))
    return weights, ids, scores, sum_partials(counts, torch.int32)


@_topk.register_fake
def _(logits: Tensor, k: int, sigmoid: bool, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, k, dtype=torch.float32),
        logits.new_empty(tokens, k, dtype=torch.int32),
        logits.new_empty(tokens, experts, dtype=torch.float32),
        logits.new_empty(experts, dtype=torch.int32),
    )


@torch.library.custom_op("moe_kernels::topk_scores_backward_triton", mutates_args=())
def _topk_backward(
    scores: Tensor,
    weights: Tensor,
    ids: Tensor,
    dweights: Tensor,
    dscores: Tensor,
    sigmoid: bool,
    renormalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    dlogits = empty(scores.shape, dtype, scores.device)
    tokens, experts = scores.shape
    config = _config(experts)
    args = (scores, weights, ids, dweights.contiguous(), dscores.contiguous(), dlogits, tokens)
    constants = _constants(experts, weights.shape[1], sigmoid, renormalize)
    launch(_backward, cdiv(tokens, config.block_m), config, *args, **constants)
    return dlogits


@_topk_backward.register_fake
def _(
    scores: Tensor,
    weights: Tensor,
    ids: Tensor,
    dweights: Tensor,
    dscores: Tensor,
    sigmoid: bool,
    renormalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(scores, dtype=dtype)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.sigmoid, ctx.renormalize = inputs
    weights, ids, scores, _ = output
    ctx.dtype = logits.dtype
    ctx.save_for_backward(scores, weights, ids)


def _differentiate(ctx: Any, dweights: Tensor, _ids: Any, dscores: Tensor, _counts: Any) -> tuple[Tensor | None, ...]:
    dlogits = _topk_backward(*ctx.saved_tensors, dweights, dscores, ctx.sigmoid, ctx.renormalize, ctx.dtype)
    return dlogits, None, None, None


_topk.register_autograd(_differentiate, setup_context=_save)


def topk_scores(logits: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """See `moe_kernels.topk.reference.topk_scores`; fp64 and E above 1,024 raise KernelError."""
    check_arguments(logits, k, score)
    ok = logits.dtype != torch.float64 and logits.shape[1] <= _MAX_EXPERTS
    rule = f"the triton backend takes logits of 16 or 32 bits and E up to {_MAX_EXPERTS} (else use the torch backend)"
    require(ok, "topk_scores", rule, logits=logits)
    weights, ids, scores, counts = _topk(logits, k, score == "sigmoid", renormalize)
    return TopK(weights, ids, scores, counts)


_TYPES = dict.fromkeys(("logits", "scores", "weights", "dweights", "dscores", "dlogits"), "*fp32")
_TYPES |= {"ids": "*i32", "counts": "*i32", "T": "i32"}
AOT_CASES = [
    AotCase(
        name=f"topk {kernel.__name__} E={experts} K={k} sigmoid={sigmoid}",
        kernel=kernel,
        types={name: _TYPES[name] for name in kernel.arg_names if name in _TYPES},
        constexprs=_constants(experts, k, sigmoid, True),
        num_warps=_config(experts).warps,
        num_stages=_config(experts).stages,
    )
    for kernel in (_forward, _backward)
    for experts, k in ((16, 4), (256, 8))
    for sigmoid in (False, True)
]
