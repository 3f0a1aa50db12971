"""X-MoE: cosine routing in a few dimensions (arXiv 2204.09179, section 3.2, equation 6).

    s_e = cos(x A, c_e) / tau        A: [D, P], c_e: [P] for each expert; tau is learned; then top-k as in topk.py

Expert embeddings in the hidden space pull hidden rows towards few directions (representation collapse); a projection to P
dimensions that belongs to the router keeps that out of the residual stream.

State: none. Cost per token: 2 D P + 2 P E FLOP and a row of P values. Traps: a code base that many papers share calls another
gate XMoE: it does not normalise x A, has no tau, and rescales its embeddings in place in each forward pass.
"""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.cosine import CosineScorer
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig


class XMoEConfig(TokenChoiceConfig):
    """X-MoE's keys."""

    name: Literal["xmoe"] = "xmoe"
    """X-MoE: cosine routing in a few dimensions"""
    router_size: PositiveInt = 16
    """dimensions P in which hidden rows and experts are compared"""
    temperature: PositiveFloat = 0.3
    """initial temperature"""


@register(XMoEConfig)
class XMoERouter(TokenChoice):
    """X-MoE; see the module's docstring."""

    def __init__(self, config: XMoEConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.scorer = CosineScorer(model, model.hidden_size, config.router_size, config.temperature)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        rows, weight = self.scorer(x)
        return self.choose(rows, weight, state, batch)
