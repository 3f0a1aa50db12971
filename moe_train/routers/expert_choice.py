"""Expert choice: experts choose tokens (arXiv 2202.09368, section 3.2), in a form that does not look ahead.

    p = softmax(x C)                 C: [D, E]
    published:  expert e takes the n = top_k * T / E tokens with the highest p_e of the micro-batch's T       (`causal: false`)
    default:    expert e takes a token where p_e >= theta_e; theta_e follows the n-th highest p_e of the steps before:
                log theta <- m log theta + (1 - m) log quantile(p_e, 1 - top_k / E)                            after each step
    w = p of the experts that took the token

A token gets as many experts as want it, top_k in the mean. In the published form whether a token is taken depends on all tokens
after it and in other rows: in a causal language model that is a leak of up to log2(T choose n) bits per expert and layer, in
training alone. With thresholds from earlier steps each token is decided by itself, at decoding too; loads then vary around top_k
* T / E, without a bound.

State: none between layers; the buffer `log_threshold` [E] between steps. The quantile comes from counts of log p in bins, summed
over the whole step, so that it does not depend on how tokens lie on ranks. Routing has E columns, of which those not taken hold
-1. Cost per token: 2 D E FLOP, a row of E scores, and E * 256 counts per layer and step in the sum over ranks. Traps: weights are
not renormalised, as published; there is no balance loss.
"""

import math
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor, nn

from moe_kernels import Backend, TopK
from moe_train.config import ModelConfig, Probability, RouterConfig
from moe_train.model.init import Constant, Normal
from moe_train.model.routing import BatchInfo, Router, Routing, register
from moe_train.routers.balance import count_choices, routing_stats

BINS, LOWEST = 256, -16.0  # of log p, from LOWEST to 0; what is lower counts as the lowest


class ExpertChoiceConfig(RouterConfig):
    """Keys of expert choice. `top_k` is the mean number of experts per token."""

    name: Literal["expert_choice"] = "expert_choice"
    """experts choose tokens"""
    causal: bool = True
    """decide by thresholds from earlier steps; false = the published form, which sees future tokens and other rows"""
    threshold_momentum: Probability = 0.9
    """share of the old threshold that stays in a step"""

    def leaks(self) -> list[str]:
        """The published form compares a token with later ones."""
        if self.causal:
            return []
        return ["model.router.causal=false: whether an expert takes a token depends on later tokens and on other rows"]


@register(ExpertChoiceConfig)
class ExpertChoiceRouter(Router):
    """Expert choice; see the module's docstring."""

    config: ExpertChoiceConfig
    log_threshold: Tensor

    def __init__(self, config: ExpertChoiceConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.share = config.top_k / model.num_experts  # of the tokens, that an expert takes
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.register_buffer("log_threshold", torch.empty(model.num_experts))
        # The first logits are normal, with this deviation where the rows that come in have a mean square of 1.
        spread = model.init_std * model.hidden_size**0.5
        quantile = NormalDist(sigma=spread).inv_cdf(max(1 - self.share, 1e-9))
        first = quantile - spread**2 / 2 - math.log(model.num_experts)
        self.initial = {"weight": Normal(model.init_std), "log_threshold": Constant(first)}

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing with E columns; `state` passes through."""
        choice: TopK = self.kernels.score_topk(x.flatten(0, 1), self.weight, self.config.top_k, "softmax", False)
        log_scores = choice.logits.detach().log_softmax(-1)
        log_scores = log_scores.view(*x.shape[:2], -1)
        taken = log_scores >= self.log_threshold if self.config.causal else self._highest(log_scores, batch)
        experts = torch.arange(len(self.weight), device=x.device, dtype=torch.int32)
        expert_ids = torch.where(taken, experts, -1).flatten(0, 1)
        counts = count_choices(expert_ids.view(1, -1), len(self.weight))[0]
        stats = routing_stats(choice._replace(tokens_per_expert=counts))
        return Routing(choice.scores, expert_ids, state, {}, stats | {"log_scores": _histogram(log_scores.flatten(0, 1))})

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Follow the step's quantile of each expert's scores."""
        momentum = self.config.threshold_momentum
        found = _quantile(stats["log_scores"].double(), self.share)
        self.log_threshold.lerp_(found.to(self.log_threshold), 1 - momentum)

    def _highest(self, scores: Tensor, batch: BatchInfo) -> Tensor:
        """Which experts take the tokens here, [B, S_local, E] bool, from scores [B, S_local, E]: each its n highest of all rows."""
        whole = batch.whole(scores)
        flat = whole.flatten(0, 1)
        count = max(self.config.top_k * len(flat) // len(self.weight), 1)
        first = flat.sort(dim=0, descending=True, stable=True).indices[:count]
        taken = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, first, True)
        return batch.here(taken.view_as(whole))


def _histogram(log_scores: Tensor) -> Tensor:
    """How many of log_scores [T, E] lie in each bin: [E, BINS] int64."""
    bins = ((log_scores - LOWEST) * (BINS / -LOWEST)).clamp(0, BINS - 1).long()
    return count_choices(bins.t(), BINS)


def _quantile(counts: Tensor, share: float) -> Tensor:
    """The log score above which `share` of each expert's tokens lie, [E], from counts [E, BINS]; linear inside of a bin."""
    above = counts.flip(-1).cumsum(-1).flip(-1)  # tokens in this bin and those over it
    wanted = share * above[:, :1]
    bin_ = (above >= wanted).sum(-1, keepdim=True) - 1  # the highest bin with so many tokens from it on
    inside = counts.gather(1, bin_)
    over = above.gather(1, bin_) - inside
    fraction = (wanted - over) / inside.clamp_min(1)
    return (LOWEST - (LOWEST / BINS) * (bin_ + 1 - fraction)).squeeze(1)
