"""Routers that merge the experts' parameters instead of choosing among experts (SMEAR, latent skills, AdaMix).

Merging reads every expert for each unit of tokens, so all experts must be whole on each rank; expert parallelism could not help.
The merged parameters exist in the compute dtype while a layer runs: 3 D F numbers for each unit.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_train.config import Conflict, ModelConfig, ParallelSection, RouterConfig
from moe_train.model.experts import Merge
from moe_train.model.routing import ExpertCall, Router, Routing
from moe_train.routers.pooling import Memory, unit_stats


class MergingConfig(RouterConfig):
    """What merging routers have in common."""

    top_k: Literal[1] = 1
    """each token goes through one merged expert"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """There are no choices to drop."""
        found = super().conflicts(model)
        if model.capacity_factor is not None:
            rule = f"router {self.name} merges experts, so that no choice could be dropped"
            found.append(Conflict("model.capacity_factor", model.capacity_factor, rule, "leave it out"))
        return found

    def layout_conflicts(self, parallel: ParallelSection) -> list[Conflict]:
        """Merging needs every expert whole on each rank."""
        rule = f"router {self.name} merges all experts for each of its units, so that every rank needs all of them whole"
        axes = {"ep": parallel.ep, "expert_tp": parallel.expert_tp}
        return [Conflict(f"parallel.{axis}", n, rule, "use 1") for axis, n in axes.items() if n > 1]


class MergingRouter(Router):
    """Base of routers that merge parameters once for each unit."""

    def merge(self, shares: Merge, ids: Tensor, state: Tensor, memory: Memory | None = None) -> Routing:
        """A Routing whose tokens go through the merged expert of their unit: shares [U, E] each, ids [T] int64 in [0, U)."""
        probs = (shares.gate_up + shares.down) / 2
        stats = unit_stats(probs, probs, ids)
        experts = torch.arange(probs.shape[1], dtype=torch.int32, device=ids.device)
        extra = (*shares, ids[:, None].int())
        return Routing(probs.detach()[ids], experts.expand(len(ids), -1), state, {}, stats, memory, extra)

    def mix(self, x: Tensor, routing: Routing, experts: ExpertCall) -> Tensor:
        """x [B, S_local, D] through the merged experts."""
        gate_up, down, ids = routing.extra
        return experts.merged(x.flatten(0, 1), ids, Merge(gate_up, down)).view_as(x)
