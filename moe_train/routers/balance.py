"""The losses and statistics that token-choice routers share. Everything is a sum over this rank's tokens.

Shapes: B rows, S positions, T = B * S tokens, E experts, K choices.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_kernels import TopK
from moe_train.model.routing import BatchInfo

BalanceScope = Literal["sequence", "micro_batch", "global_batch"]


def balance_loss(choice: TopK, batch: BatchInfo, scope: BalanceScope, previous: Tensor) -> Tensor:
    """Sum over tokens t of E * sum_e f_e p_te: [] in the scores' dtype; divided by the tokens it is 1 at uniform routing.

    f are the fractions of choices that fell on each expert, detached, counted over the row (`sequence`), over the rows of the
    micro-batch (`micro_batch`), or over the whole previous step (`global_batch`, argument `previous` [E]). p are the scores divided by
    their sum (a no-op for softmax). Source: Switch Transformers (arXiv 2101.03961), equation 4, as a sum instead of a mean, so that
    values and gradients do not depend on how tokens are spread over ranks and micro-batches.
    """
    rows = batch.tokens.shape[0]
    num_experts = choice.scores.shape[-1]
    probs = (choice.scores / choice.scores.sum(-1, keepdim=True)).view(rows, -1, num_experts)
    if scope == "global_batch":
        fractions = previous.to(probs).expand(rows, num_experts)
    else:
        if scope == "micro_batch":
            counts = choice.tokens_per_expert.expand(rows, num_experts)
        else:
            counts = count_choices(choice.expert_ids.view(rows, -1), num_experts)
        counts = batch.sum(counts.to(probs.dtype))
        fractions = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return num_experts * (fractions * probs.sum(1)).sum()


def z_loss(choice: TopK) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2, [] (ST-MoE, arXiv 2202.08906, equation 5, as a sum)."""
    return choice.logits.logsumexp(-1).square().sum()


@torch.no_grad()
def routing_stats(choice: TopK) -> dict[str, Tensor]:
    """Detached sums: how often each expert was chosen [E] and the entropy of the scores in nats []."""
    probs = choice.scores / choice.scores.sum(-1, keepdim=True)
    entropy = torch.special.entr(probs).sum()
    return {"tokens_per_expert": choice.tokens_per_expert.long(), "entropy": entropy}


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each row [B, n] of ids chose each expert: [B, E] int64. Empty slots (-1) fall into a column that is cut off."""
    columns = torch.where(expert_ids < 0, num_experts, expert_ids).long()
    counts = columns.new_zeros(expert_ids.shape[0], num_experts + 1)
    return counts.scatter_add_(1, columns, torch.ones_like(columns))[:, :num_experts]  # integers: any order gives the same sum
