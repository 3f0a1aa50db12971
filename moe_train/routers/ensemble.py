"""The soft ensemble of all experts: what SMEAR (arXiv 2306.03745, section 4, "Ensemble") saves the cost of.

    p = softmax(LN(v) LN(R)^T)                          as in pooling.py; v is the token itself by default
    y = sum_e p_e Expert_e(x)

State: none. Cost: all E experts for each token. Traps: none; it is the upper bound that the cheaper estimators are measured against.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_train.config import ModelConfig
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.pooling import GatedRouter, Memory, PooledConfig, find_units, unit_stats


class EnsembleConfig(PooledConfig):
    """The soft ensemble's keys."""

    name: Literal["ensemble"] = "ensemble"
    """every token through all experts, weighted by a softmax"""
    top_k: Literal[1] = 1
    """unused: every token visits all experts"""

    def active_experts(self, model: ModelConfig) -> int:
        """All of them."""
        return model.num_experts


@register(EnsembleConfig)
class EnsembleRouter(GatedRouter):
    """One layer; see the module's docstring."""

    config: EnsembleConfig

    def forward(
        self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Memory | None = None
    ) -> Routing:
        """x [B, S_local, D] -> Routing to all experts; `state` passes through."""
        units = find_units(x, batch, self.config, memory)
        probs = self.gate(units).softmax(-1)
        experts = torch.arange(probs.shape[1], dtype=torch.int32, device=x.device)
        stats = unit_stats(probs, probs, units.ids)
        expert_ids = experts.repeat(len(units.ids), 1)
        return Routing(probs[units.ids], expert_ids, state, {}, stats, units.memory)
