"""A router's logits, scores and choice of experts. Shapes: T tokens, P width of what the router scores, E experts, K choices.

P is the state's width in a recurrent router and the hidden size in one with a linear gate.

Cost per token in 16 bits: forward 2 P E FLOP and 2 P + 8 E + 8 K bytes (hidden read; logits, scores, weights and ids written);
backward 4 P E FLOP and 6 P + 14 E + 12 K bytes (hidden and its gradient, scores; the gradient of the logits once in 16 bits).
T=16,384, E=16, K=4, where all of it is bandwidth:

    P=128    67 MFLOP,   7 MB: A100  3 us, H100  2 us, H200  1 us; backward 134 MFLOP,  17 MB: A100  8 us, H100  5 us, H200  4 us
    P=1280  671 MFLOP,  45 MB: A100 22 us, H100 13 us, H200  9 us; backward 1.3 GFLOP, 130 MB: A100 64 us, H100 39 us, H200 27 us

Saved for backward: hidden, which the layer keeps anyway, the scores, the weights and the ids: 4 E + 8 K bytes per token.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_kernels.checks import FLOATS, require
from moe_kernels.types import TopK

Score = Literal["softmax", "sigmoid"]
SMALLEST_SUM = 1e-20  # guards the division where every selected sigmoid underflowed


def check_arguments(hidden: Tensor, weight: Tensor, k: int, score: str) -> None:
    """Raise KernelError where `score_topk` cannot take these arguments."""
    op = "score_topk"
    require(hidden.ndim == 2 and hidden.dtype in FLOATS, op, "hidden must be a floating [T, P] matrix", hidden=hidden)
    ok = weight.ndim == 2 and weight.dtype in FLOATS and weight.shape[1] == hidden.shape[1] and weight.device == hidden.device
    rule = "weight must be a floating [E, P] matrix on hidden's device, where hidden is [T, P]"
    require(ok, op, rule, weight=weight, hidden=hidden)
    require(1 <= k <= weight.shape[0], op, "k must be in 1..E", k=k, weight=weight)
    require(score in ("softmax", "sigmoid"), op, "score must be softmax or sigmoid", score=score)


def score_topk(hidden: Tensor, weight: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """Score every expert, select the `k` best of each token and count the tokens of each expert.

    hidden [T, P] of any float dtype, weight [E, P] of any -> TopK(weights [T, K], expert_ids [T, K] int32, scores [T, E],
    tokens_per_expert [E] int32, logits [T, E] = hidden weight'). The operands of the product are rounded to hidden's dtype (the
    weight may be an fp32 master); everything after is fp32 (fp64 for fp64 hidden) and no logit is ever rounded to 16 bits.
    Gradients flow from `weights`, `scores` and `logits` to both operands.

    - Experts are ranked by logit, of which either score is an increasing function: scores that saturate still rank. Among equal
      logits the lower id comes first. Where logits are finite, every token gets k distinct ids.
    - `renormalize` divides the selected scores by their sum (never by less than 1e-20). With k=1 the weight is then exactly 1,
      and the router gets no gradient through it: use renormalize=False for Switch-style top-1.

    Raises KernelError for operands that are no float matrices of one width, k outside of 1..E, or an unknown score.
    """
    check_arguments(hidden, weight, k, score)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(hidden.dtype).to(wide).T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expert_ids = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    counts = torch.stack([(expert_ids == expert).sum() for expert in range(logits.shape[1])])
    return TopK(weights, expert_ids.int(), scores, counts.int(), logits)
