"""Token-choice top-k routing with a linear gate (the baseline of every paper).

Equations (RMoE, arXiv 2408.06793, section 2; Switch Transformers, arXiv 2101.03961, equation 4 for the balance loss):

    s = x C                          C: [D, E]; with `bias`, s = x C + b
    p = softmax(s)  or  sigmoid(s)
    w = p[top k]  (divided by their sum where `renormalize`)

Group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): the experts lie in `num_groups` groups, a node's each, say;
a group's score is the sum of its top_k / top_groups best scores, and only experts of the `top_groups` best groups can be chosen,
so that a token travels to that many nodes at most.

State: none. Cost per token: 2 D E FLOP and a row of E scores. Traps: with top_k = 1 and `renormalize` the weight is 1 whatever
the router says, so that the task gives it no gradient; the configuration refuses that pair.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend, TopK
from moe_train.config import Conflict, ModelConfig, RouterConfig
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.routing import BatchInfo, Router, Routing, register
from moe_train.routers.balance import BalanceScope, balance_loss, count_choices, routing_stats, z_loss

SMALLEST_SUM = 1e-20  # guards the division where every chosen score underflowed


class TokenChoiceConfig(RouterConfig):
    """Keys that every router with top-k token choice has."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """how logits become scores"""
    renormalize: bool = True
    """divide the chosen scores by their sum"""
    num_groups: PositiveInt = 1
    """groups of consecutive experts, a node's each, say"""
    top_groups: PositiveInt = 1
    """groups that the experts of a token may come from"""
    balance_weight: NonNegativeFloat = 0.01
    """weight of the load-balancing loss, which is 1 at uniform routing; 0 = none"""
    balance_scope: BalanceScope = "micro_batch"
    """tokens over which expert loads are counted: sequence, micro_batch or global_batch (the previous step's loads)"""
    z_weight: NonNegativeFloat = 0.0
    """weight of the z-loss, the squared logsumexp of the logits; 0 = none"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """top_k = 1 with renormalised weights has no router gradient."""
        found = super().conflicts(model)
        if self.top_k == 1 and self.renormalize and not self.frozen:
            rule = "with top_k=1 every weight would be 1 and the router would get no gradient from the task"
            found.append(Conflict("model.router.renormalize", True, rule, "set it to false or raise top_k"))
        return found + self._group_conflicts(model)

    def _group_conflicts(self, model: ModelConfig) -> list[Conflict]:
        groups, top = self.num_groups, self.top_groups
        if model.num_experts % groups:
            rule = f"must divide model.num_experts={model.num_experts}"
            return [Conflict("model.router.num_groups", groups, rule, "use a divisor")]
        if top > groups:
            rule = f"must be at most model.router.num_groups={groups}"
            return [Conflict("model.router.top_groups", top, rule, "lower it or add groups")]
        if groups > 1 and (self.top_k % top or self.top_k // top > model.num_experts // groups):
            rule = f"must be a multiple of top_groups={top}, at most {model.num_experts // groups} times it (the experts of a group)"
            return [Conflict("model.router.top_k", self.top_k, rule, "change one of the two")]
        return []

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses."""
        return {"balance": self.balance_weight, "z": self.z_weight}


class TopKConfig(TokenChoiceConfig):
    """Linear gate."""

    name: Literal["topk"] = "topk"
    """softmax or sigmoid of a linear gate"""
    bias: bool = False
    """a bias for each expert's logit, as small published models have"""


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
        choice = self.score(hidden, weight)
        if self.config.num_groups > 1:
            choice = self.take(choice, self.best(choice.scores))
        return self.route(choice, state, batch)

    def score(self, hidden: Tensor, weight: Tensor) -> TopK:
        """The scores by the logits `hidden` [B, S_local, P] times `weight` [E, P], and the top_k best of all groups."""
        config = self.config
        choice: TopK = self.kernels.score_topk(hidden.flatten(0, 1), weight, config.top_k, config.scores, config.renormalize)
        return choice

    @torch.no_grad()
    def best(self, ranking: Tensor, count: int | None = None) -> Tensor:
        """The `count` (default top_k) experts that `ranking` [T, E] puts first, of the best groups: [T, count] int64.

        Among equals the lower id comes first.
        """
        config = self.config
        if config.num_groups > 1:
            groups = ranking.view(len(ranking), config.num_groups, -1)
            totals = groups.topk(config.top_k // config.top_groups, -1).values.sum(-1)
            open_groups = totals.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_groups]
            closed = torch.ones_like(totals, dtype=torch.bool).scatter_(1, open_groups, False)
            ranking = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return ranking.sort(dim=-1, descending=True, stable=True).indices[:, : count or config.top_k].contiguous()

    def take(self, choice: TopK, expert_ids: Tensor) -> TopK:
        """`choice` with the experts `expert_ids` [T, K] instead of its own; -1 is an empty slot, with weight 0."""
        weights = choice.scores.gather(1, expert_ids.clamp_min(0).long()) * (expert_ids >= 0)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
        counts = count_choices(expert_ids.view(1, -1), choice.scores.shape[1])[0]
        return choice._replace(weights=weights, expert_ids=expert_ids.int(), tokens_per_expert=counts.int())

    def route(self, choice: TopK, state: Tensor, batch: BatchInfo) -> Routing:
        """The routing that `choice` is, with its losses and statistics; `state` goes on to the next layer as it is."""
        config, losses = self.config, {}
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

    def __init__(self, config: TokenChoiceConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.initial["weight"] = Normal(model.init_std)
        self.bias: nn.Parameter | None = None
        if isinstance(config, TopKConfig) and config.bias:
            self.bias = nn.Parameter(torch.empty(model.num_experts))
            self.initial["bias"] = Constant(0.0)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        rows, weight = (x, self.weight) if self.bias is None else with_bias(x, self.weight, self.bias)
        return self.choose(rows, weight, state, batch)


def with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., P + 1] and weight [E, P + 1] whose product is x [..., P] times weight [E, P] plus bias [E]."""
    return F.pad(x, (0, 1), value=1.0), torch.cat([weight, bias[:, None]], 1)
