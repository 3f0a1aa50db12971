"""StableMoE: learn where tokens go, then stop changing it (arXiv 2204.08396, section 3).

    s = x C                          C: [D, E]
    z = V[token id] U                V: [vocabulary, P] and U: [P, E]: a light router that sees the word alone
    stage 1:  ids = the top k of s;  w = sigmoid(s)[ids]                                       equations 3 to 6
              distil = -sum_t mean_k log softmax(z)[ids_tk], with the balance loss              equations 8 and 9
    stage 2:  ids = the top k of z;  w = sigmoid(s)[ids];  V and U frozen, neither loss         equations 10 to 12

While the router learns, a token changes its expert again and again, and what the one learned about it is lost to the other. So
routing is learned in the first `stage1_share` of training and fixed for the rest, by word; C goes on learning how much the chosen
experts count.

State: none between layers; the buffer `stage2` [1], 1 once it has begun and for good, between steps: also where a run goes on
with more steps than it was started with, or starts from such weights. Cost per token: 2 D E + 2 P E FLOP and a row of V; V has
vocabulary * P parameters per layer. Traps: a frozen parameter with a zero gradient would still be decayed and moved by Adam's
momentum (`frozen` names V and U to the optimizer). Departures: the published code has one expert per token, here the target of
the distillation is spread evenly over the top k; it evaluates with the light router in stage 1 too, here with the one that
trains; its balance loss weighs only the chosen scores, here it is the one that all routers share.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Constant, Normal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig


class StableMoEConfig(TokenChoiceConfig):
    """StableMoE's keys."""

    freezes: ClassVar[bool] = True

    name: Literal["stablemoe"] = "stablemoe"
    """StableMoE: routing is learned, distilled into a router by word, and frozen"""
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """how logits become scores"""
    renormalize: bool = False
    """divide the chosen scores by their sum"""
    stage1_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """share of training in which routing is learned; it is frozen for the rest"""
    word_size: PositiveInt = 50
    """width P of the light router's word embeddings"""
    distil_weight: NonNegativeFloat = 1.0
    """weight of the distillation loss"""

    def loss_weights(self) -> dict[str, float]:
        """Weight of each entry of Routing.losses."""
        return {**super().loss_weights(), "distil": self.distil_weight}


@register(StableMoEConfig)
class StableMoERouter(TokenChoice):
    """StableMoE; see the module's docstring."""

    config: StableMoEConfig
    stage2: Tensor

    def __init__(self, config: StableMoEConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        assert model.vocab_size is not None  # Decoder has checked it
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.words = nn.Parameter(torch.empty(model.vocab_size, config.word_size))
        self.word_scorer = nn.Parameter(torch.empty(model.num_experts, config.word_size))
        self.register_buffer("stage2", torch.empty(1, dtype=torch.int64))
        self.initial |= {"weight": Normal(model.init_std), "words": Normal(1.0), "word_scorer": Normal(model.init_std)}
        self.initial["stage2"] = Constant(0.0)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        learned = self.score(x, self.weight)
        words = F.embedding(batch.here(batch.tokens).flatten(), self.words)
        logits = F.linear(words, self.word_scorer)
        expert_ids = self.best(learned.scores)
        target = torch.zeros_like(logits).scatter_(1, expert_ids, 1.0 / self.config.top_k)
        stage1 = 1 - self.stage2
        choice = self.take(learned, torch.where(self.stage2 > 0, self.best(logits), expert_ids))
        routing = self.route(choice, state, batch)
        losses = {**routing.losses, "distil": -(target * logits.log_softmax(-1)).sum()}
        return routing._replace(losses={name: (stage1 * value).sum() for name, value in losses.items()})

    def active_params(self) -> int:
        """Rows of the word table are looked up."""
        return self.weight.numel() + self.word_scorer.numel()

    def frozen(self) -> list[nn.Parameter]:
        """The light router in stage 2."""
        return [self.words, self.word_scorer] if self.stage2 else []

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Begin stage 2 when its time has come."""
        super().after_step(stats, progress)
        self.stage2.clamp_(min=int(progress >= self.config.stage1_share))
