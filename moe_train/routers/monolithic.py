"""No routing: every token through all experts, each with weight 1.

The sum of E SwiGLU MLPs of width F is one of width E F, so this is the dense layer with the parameters of the mixture (the "1x
parameters" adapter of arXiv 2306.03745, section 4). With model.num_experts=1 it is the dense layer with the compute of one expert.

State: none. Cost: all E experts. Traps: E / top_k times the compute of the router that it is compared with.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig, RouterConfig
from moe_train.model.routing import BatchInfo, Router, Routing, register


class MonolithicConfig(RouterConfig):
    """Keys of the dense layer."""

    name: Literal["monolithic"] = "monolithic"
    """no routing: one MLP as wide as all experts together"""
    top_k: Literal[1] = 1
    """unused: every token visits all experts"""

    def active_experts(self, model: ModelConfig) -> int:
        """All of them."""
        return model.num_experts


@register(MonolithicConfig)
class MonolithicRouter(Router):
    """One layer; see the module's docstring. It has no parameters."""

    config: MonolithicConfig

    def __init__(self, config: MonolithicConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.num_experts = model.num_experts

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing to all experts with weight 1; `state` passes through."""
        tokens = x.shape[0] * x.shape[1]
        experts = torch.arange(self.num_experts, dtype=torch.int32, device=x.device).repeat(tokens, 1)
        weights = torch.ones(tokens, self.num_experts, dtype=state.dtype, device=x.device)
        stats = {"tokens_per_expert": torch.full((self.num_experts,), tokens, device=x.device)}
        return Routing(weights, experts, state, {}, stats)
