"""HyperMoE as the RMoE paper compares with it: HyperRouter, a gate that a frozen network writes (arXiv 2312.07035, section 3.2).

    [C, b] = relu(e V1) V2           e: [Z], learned, one per layer; V1: [Z, P] and V2: [P, E (D + 1)], drawn once, never trained
    s = x C + b                      C: [D, E]; then top-k as in topk.py

Between a learned gate, which collapses, and a random one, which is not good: the gate moves, but only in the few directions that
e has.

State: none. Cost: 2 D E FLOP per token, as topk.py; 2 Z P + 2 P E (D + 1) FLOP per layer and forward pass, whatever the number of
tokens; P E (D + 1) frozen parameters per layer. Traps: with torch's default initial values the written gate has a standard
deviation of 0.24, ten times a linear gate's; here V1 and V2 are scaled so that it starts with `model.init_std`, and have no
biases. "HyperMoE" is also the name of an unrelated method that writes experts.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Normal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig


class HyperMoEConfig(TokenChoiceConfig):
    """HyperMoE's keys."""

    name: Literal["hypermoe"] = "hypermoe"
    """a frozen network writes the gate from a learned embedding of the layer"""
    embedding_size: PositiveInt | None = None
    """width Z of the layer's embedding; default model.hidden_size"""
    hyper_size: PositiveInt = 256
    """width P of the frozen network"""


@register(HyperMoEConfig)
class HyperMoERouter(TokenChoice):
    """HyperMoE; see the module's docstring."""

    def __init__(self, config: HyperMoEConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        size, width = config.embedding_size or model.hidden_size, config.hyper_size
        outputs = model.num_experts * (model.hidden_size + 1)
        self.embedding = nn.Parameter(torch.empty(size))
        self.reader = nn.Parameter(torch.empty(width, size), requires_grad=False)
        self.writer = nn.Parameter(torch.empty(outputs, width), requires_grad=False)
        self.initial["embedding"] = Normal(1.0)
        # What relu gets has variance 1, and so what it gives has a mean square of 1/2.
        self.initial["reader"] = Normal(size**-0.5)
        self.initial["writer"] = Normal(model.init_std * math.sqrt(2 / width))

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D] -> Routing; `state` passes through."""
        weight = (self.writer @ F.relu(self.reader @ self.embedding)).view(-1, x.shape[-1] + 1)
        return self.choose(F.pad(x, (0, 1), value=1.0), weight, state, batch)  # the bias is the weight of a constant input

    def active_params(self) -> int:
        """The gate that is written; writing it costs the same for any number of tokens."""
        return len(self.writer)
