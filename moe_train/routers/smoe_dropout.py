"""SMoE-Dropout: a random gate and more and more experts (arXiv 2303.01610, section 3.2).

    s = x C                          C: [D, E], drawn once, never trained
    k(t) = top_k + (final_top_k - top_k) * t          rounded; t: the share of training done
    w = softmax(s)[top k(t)], divided by their sum where `renormalize`

Few random experts at the start act as dropout; at the end all of them work together, and fewer can be used where compute is
short.

State: none between layers; the buffer `active` [1], today's k, between steps. Routing has final_top_k columns, of which those
past k hold -1. Cost: 2 D E FLOP per token; the experts' cost grows with k, and utilisation figures count its mean over training.
Traps: the balance loss reaches hidden rows alone, as in random.py; a learned gate in this schedule collapses, says the paper.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import Conflict, ModelConfig
from moe_train.model.init import Constant
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoiceConfig, TopKRouter


class SMoEDropoutConfig(TokenChoiceConfig):
    """Keys of SMoE-Dropout. `top_k` is the number of experts at the start."""

    name: Literal["smoe_dropout"] = "smoe_dropout"
    """a random gate that chooses more and more experts"""
    frozen: Literal[True] = True
    """it is what this router is"""
    final_top_k: PositiveInt | None = None
    """experts per token at the end of training; default all"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """k grows from top_k to at most all experts, of all groups."""
        found, final = super().conflicts(model), self.final_top_k
        if final is not None and not self.top_k <= final <= model.num_experts:
            rule = f"must be from model.router.top_k={self.top_k} to model.num_experts={model.num_experts}"
            found.append(Conflict("model.router.final_top_k", final, rule, "change it, or leave it out for all experts"))
        if self.num_groups != 1:
            rule = "a number of experts that grows cannot be kept inside groups"
            found.append(Conflict("model.router.num_groups", self.num_groups, rule, "use 1"))
        return found

    def active_experts(self, model: ModelConfig) -> int:
        """The mean over training."""
        return (self.top_k + (self.final_top_k or model.num_experts)) // 2


@register(SMoEDropoutConfig)
class SMoEDropoutRouter(TopKRouter):
    """SMoE-Dropout; see the module's docstring."""

    config: SMoEDropoutConfig
    active: Tensor

    def __init__(self, config: SMoEDropoutConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.final_top_k = config.final_top_k or model.num_experts
        self.register_buffer("active", torch.empty(1, dtype=torch.int64))
        self.initial["active"] = Constant(config.top_k)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing with final_top_k columns; `state` passes through."""
        choice = self.score(x, self.weight)
        expert_ids = self.best(choice.scores, self.final_top_k)
        columns = torch.arange(self.final_top_k, device=x.device)
        return self.route(self.take(choice, expert_ids.where(columns < self.active, -1)), state, batch)

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Set the number of experts of the next step."""
        super().after_step(stats, progress)
        top_k = self.config.top_k
        self.active.fill_(round(top_k + (self.final_top_k - top_k) * progress))
