"""A router that sends tokens where a test wants them. Only ranks import it, since it must not be among the routers that people have."""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoiceConfig, TopKRouter


class SkewedConfig(TokenChoiceConfig):
    name: Literal["skewed"] = "skewed"
    experts: list[int]
    silent: bool = False  # rows of odd number ask no expert


@register(SkewedConfig)
class SkewedRouter(TopKRouter):
    """top-k over the softmax of all experts, of which only `experts` can be chosen."""

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        choice = self.score(x, self.weight)
        open_ones = torch.zeros_like(choice.scores).index_fill(1, torch.tensor(self.config.experts), 1.0)
        ids = self.best(torch.where(open_ones > 0, choice.scores.detach(), -1.0)).int()
        if self.config.silent:
            silent = (batch.rows % 2 == 1)[:, None].expand(x.shape[:2]).flatten()
            ids = torch.where(silent[:, None], -1, ids)
        return self.route(self.take(choice, ids), state, batch)
