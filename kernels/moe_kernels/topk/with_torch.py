"""`score_topk` on any device, with a hand-written backward that saves the operands, the scores and the choice.

Autograd would keep the logits, the selected scores, their sum and int64 ids as well, and a copy of both operands in fp32 where
they have 16 bits.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.products import matmul
from moe_kernels.topk.reference import SMALLEST_SUM, Score, check_arguments
from moe_kernels.types import TopK


def score_topk(hidden: Tensor, weight: Tensor, k: int, score: Score = "softmax", renormalize: bool = True) -> TopK:
    """See `moe_kernels.topk.reference.score_topk`."""
    check_arguments(hidden, weight, k, score)
    return TopK(*_ScoreTopK.apply(hidden, weight, k, score == "sigmoid", renormalize))


class _ScoreTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, k: int, sigmoid: bool, renormalize: bool) -> tuple[Tensor, ...]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = matmul(hidden, weight.to(hidden.dtype).t(), wide)
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        best = _best(logits, k)
        weights = scores.gather(1, best)
        if renormalize:
            weights = weights.div_(weights.sum(-1, keepdim=True).clamp_min_(SMALLEST_SUM))
        expert_ids, counts = best.int(), _counts(best, weight.shape[0])
        ctx.save_for_backward(hidden, weight, weights, expert_ids, scores)
        ctx.sigmoid, ctx.renormalize = sigmoid, renormalize
        ctx.mark_non_differentiable(expert_ids, counts)
        return weights, expert_ids, scores, counts, logits

    @staticmethod
    def backward(
        ctx: Any, dweights: Tensor, _ids: Any, dscores: Tensor, _counts: Any, dlogits: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient of the logits first, then one product for each operand."""
        hidden, weight, weights, expert_ids, scores = ctx.saved_tensors
        ids, low = expert_ids.long(), hidden.dtype
        if ctx.renormalize:
            total = scores.gather(1, ids).sum(-1, keepdim=True)
            mean = (weights * dweights).sum(-1, keepdim=True) * (total >= SMALLEST_SUM)
            dweights = (dweights - mean) / total.clamp_min(SMALLEST_SUM)
        g = dscores.scatter_add(1, ids, dweights)
        g = g * scores * (1 - scores) if ctx.sigmoid else torch._softmax_backward_data(g, scores, 1, scores.dtype)
        g = (g + dlogits).to(low)
        dhidden = g @ weight.to(low) if ctx.needs_input_grad[0] else None
        dweight = matmul(g.t(), hidden, scores.dtype).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dhidden, dweight, None, None, None


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
