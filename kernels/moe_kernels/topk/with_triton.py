"""`score_topk` in Triton: logits, scores, selection, weights and counts in one kernel. T tokens, P hidden width, E experts.

A program holds all E logits of its tokens, so that nothing is left to combine but the counts; hidden and weight stream through
the load pipeline. The weight is rounded to hidden's dtype before: wgmma reads it from shared memory, as it lies there.

Backward: one kernel brings the gradients of the weights, the scores and the logits to one [T, E] in hidden's dtype; the library
multiplies it by the weight; the weight's gradient, a reduction over tokens, comes from partial sums of token ranges.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels import configs
from moe_kernels.aot import AotCase
from moe_kernels.checks import MAX_ROWS, require
from moe_kernels.configs import Config
from moe_kernels.launch import cdiv, empty, launch, power_of_2
from moe_kernels.partial_sums import range_rows, sum_partials
from moe_kernels.products import float32_precision
from moe_kernels.tiles import dot
from moe_kernels.topk.reference import SMALLEST_SUM, Score, check_arguments
from moe_kernels.types import TopK

_SMALLEST_SUM = tl.constexpr(SMALLEST_SUM)
_TAKEN = tl.constexpr(-(2**31))
_MAX_EXPERTS = 1024
_MAX_WIDTH = 2**20  # with so many experts, the weight has 32-bit indices


@triton.jit
def _to_key(x):
    """int32 that sorts like the float x: its bits, with the magnitude of negatives flipped. No number gives _TAKEN."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _logits(
    hidden,
    weight,
    rows,
    e,
    P: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BT, BE] logits of the token rows `rows` (from the pointer on) and the experts `e`; -inf past E."""
    c = tl.arange(0, BK)
    at_hidden = hidden + rows[:, None] * P + c[None, :]
    at_weight = weight + tl.minimum(e, E - 1)[None, :] * P + c[:, None]  # the strided axis: a clamp needs no mask
    x = tl.zeros((BT, BE), tl.float32)
    for k0 in range(0, P, BK):
        if P % BK == 0:
            x = dot(tl.load(at_hidden + k0), tl.load(at_weight + k0), x, PRECISION)
        else:
            a = tl.load(at_hidden + k0, mask=(k0 + c < P)[None, :], other=0.0)
            b = tl.load(at_weight + k0, mask=(k0 + c < P)[:, None], other=0.0)
            x = dot(a, b, x, PRECISION)
    return tl.where((e < E)[None, :], x, float("-inf"))


@triton.jit
def _score(x, largest, total, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.sigmoid(x)
    else:
        return tl.exp(x - largest) / total


@triton.jit(do_not_specialize=["T"])
def _forward(
    hidden,
    weight,
    logits,
    scores,
    weights,
    ids,
    counts,
    T,
    P: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    CHOICES: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * BT
    i, e, k = tl.arange(0, BT), tl.arange(0, BE), tl.arange(0, CHOICES)
    real = (first + i < T)[:, None]
    rows = tl.minimum(i, T - 1 - first)  # past T the last token once more, which is not stored
    start = first.to(tl.int64)  # offsets within a tile fit 32 bits, at half the registers
    x = _logits(hidden + start * P, weight, rows, e, P, E, BT, BE, BK, PRECISION)
    at = rows[:, None] * E + e[None, :]
    live = (e < E)[None, :]
    mask = real & live
    tl.store(logits + start * E + at, x, mask=mask)
    largest = tl.max(x, 1)[:, None]
    total = 0.0 if SIGMOID else tl.sum(tl.exp(x - largest), 1)[:, None]
    tl.store(scores + start * E + at, _score(x, largest, total, SIGMOID), mask=mask)
    keys = tl.where(live, _to_key(x), _TAKEN)
    values = tl.full((BT, CHOICES), float("-inf"), tl.float32)
    chosen = tl.zeros((BT, CHOICES), tl.int32)
    for j in range(K):  # unrolled, it compiles for a minute
        top = tl.max(keys, 1)[:, None]
        best = tl.min(tl.where(keys == top, e[None, :], BE), 1)[:, None]
        keys = tl.where(e[None, :] == best, _TAKEN, keys)
        values = tl.where(k[None, :] == j, _from_key(top), values)
        chosen = tl.where(k[None, :] == j, best, chosen)
    selected = _score(values, largest, total, SIGMOID)
    if RENORMALIZE:
        selected = selected / tl.maximum(tl.sum(selected, 1), _SMALLEST_SUM)[:, None]
    slot = rows[:, None] * K + k[None, :]
    choice = real & (k < K)[None, :]
    tl.store(weights + start * K + slot, selected, mask=choice)
    tl.store(ids + start * K + slot, chosen, mask=choice)
    tl.store(counts + tl.program_id(0) * E + e, tl.sum(((keys == _TAKEN) & mask).to(tl.int32), 0), mask=e < E)


@triton.jit(do_not_specialize=["T"])
def _backward_logits(
    scores,
    weights,
    ids,
    dweights,
    dscores,
    dlogits,
    out,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    CHOICES: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCORES: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """`out`: the gradient of the logits, through the weights, the scores (where SCORES) and themselves (where LOGITS)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e, k = tl.arange(0, BE), tl.arange(0, CHOICES)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    mask = (t < T)[:, None] & (e < E)[None, :]
    p = tl.load(scores + at, mask=mask, other=0.0)
    slot = t.to(tl.int64) * K
    g = tl.zeros((BT, BE), tl.float32)  # the gradient of the weight of each selected expert
    taken = tl.zeros((BT, BE), tl.int1)
    for j in tl.static_range(K):
        hit = e[None, :] == tl.load(ids + slot + j, mask=t < T, other=-1)[:, None]
        g = tl.where(hit, tl.load(dweights + slot + j, mask=t < T, other=0.0)[:, None], g)
        taken = taken | hit
    if RENORMALIZE:
        choice = (t < T)[:, None] & (k < K)[None, :]
        w = tl.load(weights + slot[:, None] + k[None, :], mask=choice, other=0.0)
        dw = tl.load(dweights + slot[:, None] + k[None, :], mask=choice, other=0.0)
        total = tl.sum(tl.where(taken, p, 0.0), 1)
        mean = tl.where(total >= _SMALLEST_SUM, tl.sum(w * dw, 1), 0.0)
        g = tl.where(taken, (g - mean[:, None]) / tl.maximum(total, _SMALLEST_SUM)[:, None], 0.0)
    if SCORES:
        g += tl.load(dscores + at, mask=mask, other=0.0)
    g = g * p * (1.0 - p) if SIGMOID else p * (g - tl.sum(p * g, 1)[:, None])
    if LOGITS:
        g += tl.load(dlogits + at, mask=mask, other=0.0)
    tl.store(out + at, g.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "span"])
def _backward_weight(
    dlogits,
    hidden,
    partials,
    T,
    span,
    P: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial s of the gradient of the weight [E, P], over the tokens [s * span, (s + 1) * span)."""
    s = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    c = tl.program_id(2) * BN + tl.arange(0, BN)
    i = tl.arange(0, BR)
    acc = tl.zeros((BE, BN), tl.float32)
    for start in range(s * span, tl.minimum((s + 1) * span, T), BR):  # span is a multiple of BR: only T cuts a block
        real = start + i < T
        rows = tl.minimum(start + i, T - 1).to(tl.int64)
        # dlogits comes transposed by pointer order: a transposed tile would leave the load pipeline on sm_80
        at_a = dlogits + rows[None, :] * E + e[:, None]
        at_b = hidden + rows[:, None] * P + c[None, :]
        mask = real[None, :] if E % BE == 0 else real[None, :] & (e < E)[:, None]
        a = tl.load(at_a, mask=mask, other=0.0)
        b = tl.load(at_b) if P % BN == 0 else tl.load(at_b, mask=(c < P)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    to = partials + s.to(tl.int64) * (E * P)
    tl.store(to + e[:, None] * P + c[None, :], acc, mask=(e < E)[:, None] & (c < P)[None, :])


def _forward_config(num_experts: int, dtype: torch.dtype) -> Config:
    """block_m tokens x all experts x block_k along P; fp32 products are no matrix instructions and need the registers."""
    lanes, wide = power_of_2(num_experts, 16), dtype.itemsize // 2
    if lanes <= 128:
        return Config(block_m=(64 if lanes <= 64 else 32) // wide, block_n=lanes, block_k=64 // wide, warps=4, stages=3)
    if lanes <= 256:
        return Config(block_m=32 // wide, block_n=lanes, block_k=64 // wide, warps=8, stages=3)
    # two stages of the weight's tile must fit sm_80
    return Config(block_m=16 // wide, block_n=lanes, block_k=32 // wide, warps=8, stages=3)


def _logits_config(num_experts: int) -> Config:
    """block_m tokens x all experts."""
    lanes = power_of_2(num_experts, 2)
    return Config(block_m=max(1024 // lanes, 1), block_n=lanes, block_k=1, warps=4, stages=3)


def _weight_config(num_experts: int, dtype: torch.dtype) -> Config:
    """block_m experts x block_n columns of P x block_k tokens."""
    block_m = min(power_of_2(num_experts, 16), 64)
    return Config(block_m=block_m, block_n=128, block_k=128 // dtype.itemsize, warps=4, stages=4)


def _forward_constants(
    width: int, experts: int, dtype: torch.dtype, k: int, sigmoid: bool, renormalize: bool
) -> dict[str, Any]:
    config = _forward_config(experts, dtype)
    block_k = min(config.block_k, power_of_2(width, 16))
    tile = {"BT": config.block_m, "BE": config.block_n, "BK": block_k, "CHOICES": power_of_2(k, 2)}
    shape = {"P": width, "E": experts, "K": k, "PRECISION": float32_precision()}
    return shape | tile | {"SIGMOID": sigmoid, "RENORMALIZE": renormalize}


def _logits_constants(experts: int, k: int, sigmoid: bool, renormalize: bool, scores: bool, logits: bool) -> dict[str, Any]:
    config = _logits_config(experts)
    tile = {"BT": config.block_m, "BE": config.block_n, "CHOICES": power_of_2(k, 2)}
    flags = {"SIGMOID": sigmoid, "RENORMALIZE": renormalize, "SCORES": scores, "LOGITS": logits}
    return {"E": experts, "K": k} | tile | flags


def _weight_constants(width: int, experts: int, dtype: torch.dtype) -> dict[str, Any]:
    config = _weight_config(experts, dtype)
    tile = {"BE": config.block_m, "BN": min(config.block_n, power_of_2(width, 16)), "BR": config.block_k}
    return {"P": width, "E": experts, "PRECISION": float32_precision()} | tile


def _ranges(constants: dict[str, Any]) -> int:
    """How many token ranges the weight's gradient has: more where there are few tiles, by shapes alone, so that its bits
    depend on nothing else."""
    tiles = cdiv(constants["E"], constants["BE"]) * cdiv(constants["P"], constants["BN"])
    return max(16, 256 // tiles)


@torch.library.custom_op("moe_kernels::score_topk_triton", mutates_args=())
def _score_topk(
    hidden: Tensor, weight: Tensor, k: int, sigmoid: bool, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, width = hidden.shape
    experts, device = weight.shape[0], hidden.device
    config = _forward_config(experts, hidden.dtype)
    programs = cdiv(tokens, config.block_m)
    weights, ids = empty((tokens, k), torch.float32, device), empty((tokens, k), torch.int32, device)
    logits, scores = (empty((tokens, experts), torch.float32, device) for _ in range(2))
    counts = empty((programs, experts), torch.int32, device)
    operands = (hidden.contiguous(), weight.to(hidden.dtype).contiguous())
    constants = _forward_constants(width, experts, hidden.dtype, k, sigmoid, renormalize)
    launch(_forward, programs, config, *operands, logits, scores, weights, ids, counts, tokens, **constants)
    return weights, ids, scores, sum_partials(counts, torch.int32), logits


@_score_topk.register_fake
def _(
    hidden: Tensor, weight: Tensor, k: int, sigmoid: bool, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = hidden.shape[0], weight.shape[0]
    return (
        hidden.new_empty(tokens, k, dtype=torch.float32),
        hidden.new_empty(tokens, k, dtype=torch.int32),
        hidden.new_empty(tokens, experts, dtype=torch.float32),
        hidden.new_empty(experts, dtype=torch.int32),
        hidden.new_empty(tokens, experts, dtype=torch.float32),
    )


@torch.library.custom_op("moe_kernels::score_topk_logits_triton", mutates_args=())
def _backward_of_logits(
    scores: Tensor,
    weights: Tensor,
    ids: Tensor,
    dweights: Tensor,
    dscores: Tensor | None,
    dlogits: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits [T, E] in `dtype`, of which a product with the weight or with hidden is the rest."""
    tokens, experts = scores.shape
    out = empty(scores.shape, dtype, scores.device)
    config = _logits_config(experts)
    flags = (sigmoid, renormalize, dscores is not None, dlogits is not None)
    others = [scores if grad is None else grad.contiguous() for grad in (dscores, dlogits)]  # what is absent is never read
    args = (scores, weights, ids, dweights.contiguous(), *others, out, tokens)
    launch(
        _backward_logits, cdiv(tokens, config.block_m), config, *args, **_logits_constants(experts, weights.shape[1], *flags)
    )
    return out


@_backward_of_logits.register_fake
def _(
    scores: Tensor,
    weights: Tensor,
    ids: Tensor,
    dweights: Tensor,
    dscores: Tensor | None,
    dlogits: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(scores, dtype=dtype)


@torch.library.custom_op("moe_kernels::score_topk_weight_triton", mutates_args=())
def _backward_of_weight(dlogits: Tensor, hidden: Tensor) -> Tensor:
    """dlogits^T hidden: [E, P] fp32."""
    dlogits, hidden = dlogits.contiguous(), hidden.contiguous()
    (tokens, experts), width = dlogits.shape, hidden.shape[1]
    constants, config = _weight_constants(width, experts, hidden.dtype), _weight_config(experts, hidden.dtype)
    span = range_rows(tokens, _ranges(constants), config.block_k)
    ranges = cdiv(tokens, span) if tokens else 0
    partials = empty((ranges, experts * width), torch.float32, hidden.device)
    grid = (ranges, cdiv(experts, constants["BE"]), cdiv(width, constants["BN"]))
    launch(_backward_weight, grid, config, dlogits, hidden, partials, tokens, span, **constants)
    return sum_partials(partials, torch.float32).view(experts, width)


@_backward_of_weight.register_fake
def _(dlogits: Tensor, hidden: Tensor) -> Tensor:
    return hidden.new_empty(dlogits.shape[1], hidden.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, ctx.sigmoid, ctx.renormalize = inputs
    weights, ids, scores, _, _ = output
    ctx.set_materialize_grads(False)  # the scores and the logits often have no gradient
    ctx.save_for_backward(hidden, weight, scores, weights, ids)


def _differentiate(
    ctx: Any, dweights: Tensor | None, _ids: Any, dscores: Tensor | None, _counts: Any, dlogits: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, scores, weights, ids = ctx.saved_tensors
    dweights = torch.zeros_like(weights) if dweights is None else dweights
    flags = (ctx.sigmoid, ctx.renormalize, hidden.dtype)
    low = _backward_of_logits(scores, weights, ids, dweights, dscores, dlogits, *flags)
    dhidden = low @ weight.to(low.dtype) if ctx.needs_input_grad[0] else None
    dweight = _backward_of_weight(low, hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return dhidden, dweight, None, None, None


_score_topk.register_autograd(_differentiate, setup_context=_save)


def score_topk(hidden: Tensor, weight: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """See `moe_kernels.topk.reference.score_topk`; fp64, E above 1,024, P above 2^20 and T above 2^30 raise KernelError.
    fp32 products follow torch's float32 matmul precision."""
    check_arguments(hidden, weight, k, score)
    configs.require_supported("score_topk", hidden)
    ok = hidden.shape[0] <= MAX_ROWS and weight.shape[0] <= _MAX_EXPERTS and weight.shape[1] <= _MAX_WIDTH
    rule = f"the triton backend takes E up to {_MAX_EXPERTS}, P up to 2^20 and T up to 2^30 (else use the torch backend)"
    require(ok, "score_topk", rule, hidden=hidden, weight=weight)
    return TopK(*_score_topk(hidden, weight, k, score == "sigmoid", renormalize))


_TYPES = dict.fromkeys(("logits", "scores", "weights", "dweights", "dscores", "partials"), "*fp32")
_TYPES |= {"ids": "*i32", "counts": "*i32", "T": "i32", "span": "i32"}


def _aot_case(name: str, kernel: Any, config: Config, constants: dict[str, Any], dtype: torch.dtype) -> AotCase:
    operand = "*fp32" if dtype == torch.float32 else "*bf16"
    types = _TYPES | dict.fromkeys(("hidden", "weight", "out"), operand)
    types["dlogits"] = operand if kernel is _backward_weight else "*fp32"
    return AotCase(
        name=f"{name} {operand[1:]}",
        kernel=kernel,
        types={arg: types[arg] for arg in kernel.arg_names if arg in types},
        constexprs=constants,
        num_warps=config.warps,
        num_stages=config.stages,
        piped_operands=0 if kernel is _backward_logits or dtype == torch.float32 else 2,
    )


def _aot_cases(kind: str, width: int, experts: int, k: int, dtype: torch.dtype = torch.bfloat16) -> list[AotCase]:
    shape = f"P={width} E={experts} K={k}"
    weight = (_weight_config(experts, dtype), _weight_constants(width, experts, dtype), dtype)
    found = [_aot_case(f"{kind} weight {shape}", _backward_weight, *weight)]
    for score in ("softmax", "sigmoid"):
        sigmoid = score == "sigmoid"
        forward = (_forward_config(experts, dtype), _forward_constants(width, experts, dtype, k, sigmoid, True), dtype)
        found.append(_aot_case(f"{kind} forward {shape} {score}", _forward, *forward))
        logits = (_logits_config(experts), _logits_constants(experts, k, sigmoid, True, True, True), dtype)
        found.append(_aot_case(f"{kind} logits {shape} {score}", _backward_logits, *logits))
    return found


def _other_flags() -> list[AotCase]:
    """Without renormalisation, and with other gradients than those of the weights, the scores and the logits together."""
    found, dtype = [], torch.bfloat16
    for score, renormalize in product(("softmax", "sigmoid"), (True, False)):
        said = f"{score} renormalize={renormalize}"
        if not renormalize:
            constants = _forward_constants(128, 16, dtype, 4, score == "sigmoid", False)
            found.append(_aot_case(f"table forward {said}", _forward, _forward_config(16, dtype), constants, dtype))
        for scores, logits in product((True, False), (True, False)):
            if not (renormalize and scores and logits):
                constants = _logits_constants(16, 4, score == "sigmoid", renormalize, scores, logits)
                name = f"table logits {said} scores={scores} logits={logits}"
                found.append(_aot_case(name, _backward_logits, _logits_config(16), constants, dtype))
    return found


AOT_CASES = [
    *_other_flags(),
    *_aot_cases("flagship", 128, 16, 4),
    *_aot_cases("flagship", 1280, 16, 4),
    *_aot_cases("table", 128, 16, 4, torch.float32),
    *_aot_cases("table", 2048, 128, 8, torch.float32),
    *_aot_cases("table", 4096, 1024, 8, torch.float32),
    *_aot_cases("table", 2048, 64, 6),
    *_aot_cases("table", 2048, 128, 8),
    *_aot_cases("table", 2000, 100, 8),
    *_aot_cases("table", 4096, 256, 8),
    *_aot_cases("table", 4096, 512, 8),
    *_aot_cases("table", 4096, 1024, 8),
]
