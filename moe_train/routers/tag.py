"""One expert for each source of text: the expert is the document's label (the "Tag" baseline of arXiv 2306.03745, section 4).

    i = experts_of_labels[label], or label mod E where that key has no entry;  y = Expert_i(x)

Labels are those of the prepared corpus (`PREFIX.labels`); 0 is "unknown".

State: none. Cost: one expert. Traps: a corpus without labels sends every token to expert 0; several labels on one expert share it, as
two tasks did in the published comparison; nothing is learned, so the labels' sizes are the experts' loads.
"""

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import Conflict, ModelConfig, RouterConfig
from moe_train.model.routing import BatchInfo, Router, Routing, register
from moe_train.routers.balance import count_choices


class TagConfig(RouterConfig):
    """Keys of routing by label."""

    reads_labels: ClassVar[bool] = True
    name: Literal["tag"] = "tag"
    """the document's label chooses the expert"""
    top_k: Literal[1] = 1
    """one expert per token"""
    experts_of_labels: list[NonNegativeInt] = []
    """the experts of labels 0, 1, ...; a label beyond the list goes to expert label mod num_experts"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """Every named expert exists."""
        found = super().conflicts(model)
        if any(expert >= model.num_experts for expert in self.experts_of_labels):
            rule = f"names an expert that is not below model.num_experts={model.num_experts}"
            found.append(Conflict("model.router.experts_of_labels", self.experts_of_labels, rule, "change it or add experts"))
        return found


@register(TagConfig)
class TagRouter(Router):
    """One layer; see the module's docstring. It has no parameters."""

    config: TagConfig

    def __init__(self, config: TagConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.num_experts = model.num_experts

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing to the expert of each token's label; `state` passes through."""
        labels = batch.here(batch.labels).flatten()
        chosen = labels % self.num_experts
        if named := self.config.experts_of_labels:
            table = torch.tensor(named, device=x.device)
            chosen = torch.where(labels < len(named), table[labels.clamp_max(len(named) - 1)], chosen)
        weights = torch.ones(len(labels), 1, dtype=state.dtype, device=x.device)
        stats = {"tokens_per_expert": count_choices(chosen[None], self.num_experts)[0]}
        return Routing(weights, chosen[:, None].int(), state, {}, stats)
