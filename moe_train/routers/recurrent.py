"""RMoE: the layerwise recurrent router (arXiv 2408.06793).

A token's router at layer l sees the token's hidden row and a state that a recurrent cell carries from layer to layer. The recurrence
runs over depth and never over time, so tokens do not mix and decoding needs no router cache. One cell is shared by all layers; each
layer owns its projector A_l and its scorer C_l. Equations 3 to 5 of the paper, with the candidate's two matrices as in its code:

    z = x A_l                                          A_l: [D, P] (`projector: layer`), or none (`projector: shared`: z = x)
    r = sigmoid(z W_ir + b_ir + h W_hr + b_hr)
    u = sigmoid(z W_iz + b_iz + h W_hz + b_hz)
    n = tanh(z W_in + b_in + r * (h W_hn + b_hn))
    h' = (1 - u) n + u h                               (torch.nn.GRUCell)
    s = h' C_l                                         C_l: [P, E]; then top-k as in topk.py

State: h, fp32, P floats per token (lstm: h and c, 2P), zero before the first layer. `passing: none` is the paper's NP ablation (the
cell starts from zero at each layer), `detached` passes values without gradients. Traps: the initial logits are about 15 times flatter
than a linear gate's (small A and C multiply), so part of a comparison may be scale; the cell's weights belong to every layer, so a
layout that puts layers on different ranks must sum their gradients.
"""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Normal, Uniform
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import TokenChoice, TokenChoiceConfig

GATES = {"gru": 3, "rnn": 1, "lstm": 4}


class RecurrentConfig(TokenChoiceConfig):
    """RMoE's keys."""

    name: Literal["recurrent"] = "recurrent"
    """RMoE: a recurrent cell carries router state from layer to layer"""
    router_size: PositiveInt = 128
    """width P of the cell"""
    cell: Literal["gru", "rnn", "lstm"] = "gru"
    """recurrent cell"""
    projector: Literal["layer", "shared"] = "layer"
    """layer: each layer projects its hidden rows to P; shared: the cell reads hidden rows directly"""
    passing: Literal["full", "none", "detached"] = "full"
    """what goes from layer to layer: the state with its gradient, nothing, or the state alone"""


class Cell(nn.Module):
    """The recurrent cell: one copy, owned by the decoder, lent to every layer. Weights as in torch.nn.GRUCell, RNNCell, LSTMCell."""

    def __init__(self, kind: str, input_size: int, size: int, kernels: Backend) -> None:
        super().__init__()
        self.kind, self.size, self.kernels = kind, size, kernels
        rows = GATES[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.initial = {name: Uniform(size**-0.5) for name, _ in self.named_parameters()}

    def forward(self, z: Tensor, state: Tensor) -> Tensor:
        """z [T, input] and state [T, R] -> next state [T, R]; its first `size` columns are what the scorer reads."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if self.kind == "gru":
            return self.kernels.gru_step(z, state, *weights)
        h, c = state.split(self.size, -1) if self.kind == "lstm" else (state, state)
        gates = _lift(z, state) @ self.weight_ih.t() + self.bias_ih + h @ self.weight_hh.t() + self.bias_hh
        if self.kind == "rnn":
            return gates.tanh()
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return torch.cat([o.sigmoid() * c.tanh(), c], -1)


def _lift(z: Tensor, state: Tensor) -> Tensor:
    """z in the state's dtype (fp32, or fp64 in an fp64 model)."""
    return z.to(state.dtype)


@register(RecurrentConfig)
class RecurrentRouter(TokenChoice):
    """One layer of RMoE; see the module's docstring."""

    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.initial |= {"scorer": Normal(model.init_std), "projector": Normal(model.init_std)}
        if config.projector == "layer":
            self.projector = nn.Parameter(torch.empty(config.router_size, model.hidden_size))
        self.scorer = nn.Parameter(torch.empty(model.num_experts, config.router_size))

    @staticmethod
    def state_size_of(config: RecurrentConfig) -> int:
        """Columns of router state per token."""
        return config.router_size * (2 if config.cell == "lstm" else 1)

    @staticmethod
    def make_shared(config: RecurrentConfig, model: ModelConfig, kernels: Backend) -> nn.Module:
        """The cell that all layers share."""
        input_size = config.router_size if config.projector == "layer" else model.hidden_size
        return Cell(config.cell, input_size, config.router_size, kernels)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D], state [B, S_local, R] -> Routing with the next state."""
        assert shared is not None  # the decoder makes it with make_shared
        z = F.linear(x, self.projector.to(x.dtype)) if self.config.projector == "layer" else x
        before = {"full": state, "none": torch.zeros_like(state), "detached": state.detach()}[self.config.passing]
        after = shared(z.flatten(0, 1), before.flatten(0, 1)).view_as(state)
        hidden = after[..., : self.config.router_size]
        return self.choose(hidden.to(x.dtype), self.scorer, after, batch)
