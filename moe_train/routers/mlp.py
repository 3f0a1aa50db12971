"""A gate with one hidden layer (SMoE-MLP of the RMoE paper, arXiv 2408.06793, section 4).

    s = gelu(x W1 + b1) W2 + b2      W1: [D, P], W2: [P, E]; then top-k as in topk.py

It has about as many parameters as a recurrent router (P = 256 against a GRU of 128 that all layers share) and no memory of the
layers before: what RMoE gains over it is not due to size.

State: none. Cost per token: 2 D P + 2 P E FLOP and a row of P values. Traps: its initial logits are flatter than a linear gate's,
as a recurrent router's are.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Constant, Normal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig, with_bias


class MLPConfig(TokenChoiceConfig):
    """Keys of the MLP gate."""

    name: Literal["mlp"] = "mlp"
    """a gate with one hidden layer"""
    router_size: PositiveInt = 256
    """width P of the hidden layer"""


@register(MLPConfig)
class MLPRouter(TokenChoice):
    """MLP gate; see the module's docstring."""

    def __init__(self, config: MLPConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.hidden = nn.Parameter(torch.empty(config.router_size, model.hidden_size))
        self.hidden_bias = nn.Parameter(torch.empty(config.router_size))
        self.scorer = nn.Parameter(torch.empty(model.num_experts, config.router_size))
        self.scorer_bias = nn.Parameter(torch.empty(model.num_experts))
        self.initial |= {"hidden": Normal(model.init_std), "scorer": Normal(model.init_std)}
        self.initial |= {"hidden_bias": Constant(0.0), "scorer_bias": Constant(0.0)}

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        hidden = F.gelu(F.linear(x, self.hidden.to(x.dtype), self.hidden_bias.to(x.dtype)))
        return self.choose(*with_bias(hidden, self.scorer, self.scorer_bias), state, batch)
