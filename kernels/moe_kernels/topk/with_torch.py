"""`topk_scores` on any device. Autograd's own graph is small here: it saves [T, E] and [T, K] fp32 values only."""

import torch
from torch import Tensor

from moe_kernels.topk.reference import SMALLEST_SUM, Score, check_arguments
from moe_kernels.types import TopK


def topk_scores(logits: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """See `moe_kernels.topk.reference.topk_scores`."""
    check_arguments(logits, k, score)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expert_ids = _best(logits.detach(), k)
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    return TopK(weights, expert_ids.int(), scores, _counts(expert_ids, logits.shape[1]))


def _best(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, the lower id first among equals.

    torch.topk breaks ties arbitrarily, and a stable sort costs twice its time: so the keys are made unique. The bits of a
    float, as an integer with the magnitude of negatives flipped, sort like the float; the id fills the low half of an int64.
    """
    if logits.dtype == torch.float64:
        return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logits.shape[1] - 1
    keys = (ordered.long() << 32) | torch.arange(last, -1, -1, device=logits.device)
    return last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)


def _counts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert by comparison: `bincount` syncs with the host on CUDA and has no static shape."""
    if expert_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.bincount(expert_ids.flatten(), minlength=num_experts).int()
    experts = torch.arange(num_experts, device=expert_ids.device)
    return (expert_ids.reshape(-1, 1) == experts).sum(0, dtype=torch.int32)
