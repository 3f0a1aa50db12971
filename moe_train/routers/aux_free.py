"""Loads balanced by a bias on the choice instead of a loss (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437,
equation 16).

    s = sigmoid(x C)                 C: [D, E] (or softmax)
    ids = the top k of s + b;   w = s[ids], divided by their sum: the bias decides who is chosen and never how much it counts
    b_e <- b_e + rate * sign(mean load - load_e)      after each step, from the loads of the whole step

A balance loss pulls at the router against the task; this moves loads without a gradient. DeepSeek-V3 adds a small balance loss
per sequence (`balance_weight: 1e-4`, `balance_scope: sequence`).

State: none between layers; the buffer `expert_bias` [E] between steps. Causal: a step's own loads never change its choices. Cost:
as topk.py and a second sort of E scores. Traps: the bias is a sum of many small steps, which 16 bits would swallow, so it is fp32
in a model of any dtype; updated inside of the forward pass it would let later tokens decide over earlier ones, and recomputation
would count twice.
"""

from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Constant
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoiceConfig, TopKRouter


class AuxFreeConfig(TokenChoiceConfig):
    """Keys of balancing without a loss; the others keep their meaning."""

    name: Literal["aux_free"] = "aux_free"
    """balanced by a bias on the choice instead of a loss"""
    scores: Literal["softmax", "sigmoid"] = "sigmoid"
    """how logits become scores"""
    balance_weight: NonNegativeFloat = 0.0
    """weight of a load-balancing loss beside the bias; 0 = none"""
    bias_rate: NonNegativeFloat = 0.001
    """how far an expert's bias moves in a step"""


@register(AuxFreeConfig)
class AuxFreeRouter(TopKRouter):
    """Linear gate with a bias on the choice; see the module's docstring."""

    config: AuxFreeConfig
    expert_bias: Tensor

    def __init__(self, config: AuxFreeConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.register_buffer("expert_bias", torch.empty(model.num_experts, dtype=torch.float32))
        self.initial["expert_bias"] = Constant(0.0)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        choice = self.score(x, self.weight)
        return self.route(self.take(choice, self.best(choice.scores.detach() + self.expert_bias)), state, batch)

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Raise the bias of experts below the mean load of the step and lower it above."""
        super().after_step(stats, progress)
        loads = stats["tokens_per_expert"].double()
        self.expert_bias += self.config.bias_rate * (loads.mean() - loads).sign().to(self.expert_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model and never be cast with it: casts leave integers alone, and so the bits travel as integers."""
        bits = self.expert_bias.view(torch.int32)
        super()._apply(fn, recurse)
        self.expert_bias = fn(bits).view(torch.float32)
        return self
