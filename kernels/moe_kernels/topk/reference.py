"""Router scores and the choice of experts. Shapes: T tokens, E experts, K choices.

Cost at the flagship shape (T=16,384, E=16, K=4): about 1.5 MFLOP and 160 B per token (64 read, 96 written) = 2.6 MB,
bandwidth-bound: A100 1.3 us, H100 0.8 us, H200 0.5 us forward, and as much backward; a launch costs more than either.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_kernels.checks import FLOATS, require
from moe_kernels.types import TopK

Score = Literal["softmax", "sigmoid"]
SMALLEST_SUM = 1e-20  # guards the division where every selected sigmoid underflowed


def check_arguments(logits: Tensor, k: int, score: str) -> None:
    """Raise KernelError where `topk_scores` cannot take these arguments."""
    op = "topk_scores"
    require(logits.ndim == 2 and logits.dtype in FLOATS, op, "logits must be a floating [T, E] matrix", logits=logits)
    require(1 <= k <= logits.shape[1], op, "k must be in 1..E", k=k, logits=logits)
    require(score in ("softmax", "sigmoid"), op, "score must be softmax or sigmoid", score=score)


def topk_scores(logits: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """Score every expert, select the `k` best of each token and count the tokens of each expert.

    logits [T, E] of any float dtype -> TopK(weights [T, K], expert_ids [T, K] int32, scores [T, E], tokens_per_expert [E]
    int32). The arithmetic and the results are fp32 (fp64 for fp64 logits); gradients flow from `weights` and from `scores` to
    `logits`.

    - Experts are ranked by logit, of which either score is an increasing function: scores that saturate still rank, and every
      backend chooses the same ids. Among equal logits the lower id comes first. Logits may be -inf, but not NaN.
    - `renormalize` divides the selected scores by their sum (never by less than 1e-20). With k=1 the weight is then exactly 1,
      and the router gets no gradient through it: use renormalize=False for Switch-style top-1.

    Raises KernelError for logits that are no float matrix, k outside of 1..E, or an unknown score.
    """
    check_arguments(logits, k, score)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expert_ids = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    counts = torch.stack([(expert_ids == expert).sum() for expert in range(logits.shape[1])])
    return TopK(weights, expert_ids.int(), scores, counts.int())
