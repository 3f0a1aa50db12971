"""Cosine gate (CosineMoE of the RMoE paper, arXiv 2408.06793, section 4; X-MoE, arXiv 2204.09179, equation 6, without its
projection).

    s_e = cos(x, c_e) / tau          c_e: [D] for each expert; tau is learned; then top-k as in topk.py

The norms of hidden rows and of expert embeddings, which a linear gate rewards, count for nothing. xmoe.py compares in a few
dimensions.

State: none. Cost per token: 2 D E + 3 D FLOP and the normed row. Traps: in D dimensions random directions are nearly orthogonal,
so that a tau of 1 would make all scores equal; a learned tau that falls without bound would end routing's gradient, so it stays
above 0.01.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig

SMALLEST_TEMPERATURE = 0.01


class CosineConfig(TokenChoiceConfig):
    """Keys of the cosine gate."""

    name: Literal["cosine"] = "cosine"
    """cosine of hidden row and expert embedding over a learned temperature"""
    temperature: PositiveFloat = 0.3
    """initial temperature"""


class CosineScorer(nn.Module):
    """Expert embeddings and a temperature; with `size`, rows of `width` are projected to so many dimensions first (X-MoE)."""

    def __init__(self, model: ModelConfig, width: int, size: int | None, temperature: float) -> None:
        super().__init__()
        self.projector = None if size is None else nn.Parameter(torch.empty(size, width))
        self.embeddings = nn.Parameter(torch.empty(model.num_experts, size or width))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.initial: dict[str, Initial] = {name: Normal(model.init_std) for name in ("projector", "embeddings")}
        self.initial["log_scale"] = Constant(-math.log(temperature))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., width] -> what to score [..., size] in x's dtype and the weight [E, size] whose product are the logits."""
        rows = x if self.projector is None else F.linear(x, self.projector.to(x.dtype))
        scale = self.log_scale.clamp_max(-math.log(SMALLEST_TEMPERATURE)).exp()
        rows = scale * F.normalize(rows.to(scale.dtype), dim=-1)
        return rows.to(x.dtype), F.normalize(self.embeddings, dim=-1)


@register(CosineConfig)
class CosineRouter(TokenChoice):
    """Cosine gate; see the module's docstring."""

    def __init__(self, config: CosineConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.scorer = CosineScorer(model, model.hidden_size, None, config.temperature)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        rows, weight = self.scorer(x)
        return self.choose(rows, weight, state, batch)
