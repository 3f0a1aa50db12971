"""Token-choice top-k routing with a linear gate (the baseline of every paper).

Equations (RMoE, arXiv 2408.06793, section 2; Switch Transformers, arXiv 2101.03961, equation 4 for the balance loss):

    s = x C                          C: [D, E], no bias
    p = softmax(s)  or  sigmoid(s)
    w = p[top k]  (divided by their sum where `renormalize`)

State: none. Traps: with top_k = 1 and `renormalize` the weight is 1 whatever the router says, so that the task gives it no gradient;
the configuration refuses that pair.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from moe_kernels import Backend, TopK
from moe_train.config import Conflict, ModelConfig, RouterConfig
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.routing import BatchInfo, Router, Routing, register
from moe_train.routers.balance import BalanceScope, balance_loss, routing_stats, z_loss


class TokenChoiceConfig(RouterConfig):
    """Keys that every router with top-k token choice has."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """how logits become scores"""
    renormalize: bool = True
    """divide the chosen scores by their sum"""
    balance_weight: NonNegativeFloat = 0.01
    """weight of the load-balancing loss, which is 1 at uniform routing; 0 = none"""
    balance_scope: BalanceScope = "micro_batch"
    """tokens over which expert loads are counted: sequence, micro_batch or global_batch (the previous step's loads)"""
    z_weight: NonNegativeFloat = 0.0
    """weight of the z-loss, the squared logsumexp of the logits; 0 = none"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """top_k = 1 with renormalised weights has no router gradient."""
        found = super().conflicts(model)
        if self.top_k == 1 and self.renormalize:
            rule = "with top_k=1 every weight would be 1 and the router would get no gradient from the task"
            found.append(Conflict("model.router.renormalize", True, rule, "set it to false or raise top_k"))
        return found

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses."""
        return {"balance": self.balance_weight, "z": self.z_weight}


class TopKConfig(TokenChoiceConfig):
    """Linear gate."""

    name: Literal["topk"] = "topk"
    """softmax or sigmoid of a linear gate"""


class TokenChoice(Router):
    """What token-choice routers share: from what they score to a Routing. `fractions`: the previous step's loads (`global_batch`)."""

    config: TokenChoiceConfig
    fractions: Tensor

    def __init__(self, config: TokenChoiceConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.register_buffer("fractions", torch.empty(model.num_experts))
        self.initial: dict[str, Initial] = {"fractions": Constant(1.0 / model.num_experts)}

    def choose(self, hidden: Tensor, weight: Tensor, state: Tensor, batch: BatchInfo) -> Routing:
        """Route by the logits `hidden` [B, S_local, P] times `weight` [E, P]; `state` goes on to the next layer as it is."""
        config = self.config
        arguments = (config.top_k, config.scores, config.renormalize)
        choice: TopK = self.kernels.score_topk(hidden.flatten(0, 1), weight, *arguments)
        losses = {}
        if config.balance_weight:
            losses["balance"] = balance_loss(choice, batch, config.balance_scope, self.fractions)
        if config.z_weight:
            losses["z"] = z_loss(choice)
        return Routing(choice.weights, choice.expert_ids, state, losses, routing_stats(choice))

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Keep this step's loads for the next step's `global_batch` balance loss."""
        loads = stats["tokens_per_expert"].to(self.fractions)
        self.fractions.copy_(loads / loads.sum())


@register(TopKConfig)
class TopKRouter(TokenChoice):
    """Linear gate; see the module's docstring."""

    def __init__(self, config: TopKConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.initial["weight"] = Normal(model.init_std)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        return self.choose(x, self.weight, state, batch)
