"""The experts of one layer, MLPs in stacked weights. Shapes: T tokens, D hidden, F expert width, E experts, K choices, M = T * K."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend, Plan
from moe_train.config import ModelConfig
from moe_train.model.init import Constant, Initial, Normal, Stack

Drop = Callable[[Tensor, Plan], Tensor]  # hidden rows [M, F], sorted by expert as the plan says -> the same shape


class Merge(NamedTuple):
    """How n experts are mixed from the parameters of all E."""

    gate_up: Tensor  # [n, E] each expert's share in the n gate and up projections (up projections, where there is no gate)
    down: Tensor  # [n, E] the same for the down projections


class Experts(nn.Module):
    """E SwiGLU MLPs: `gate_up` [E, 2, F, D] (gate, then up), `down` [E, D, F]."""

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.hidden_size, config.ffn_hidden_size
        self.count = count
        self.gate_up = nn.Parameter(torch.empty(count, 2, width, size))
        self.down = nn.Parameter(torch.empty(count, size, width))
        self.initial = {name: Stack(Normal(config.init_std)) for name in ("gate_up", "down")}
        self.kernels = kernels

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor, merge: Merge | None = None) -> Tensor:
        """x [T, D], expert_ids and weights [T, K] -> [T, D]: the weighted sum of each token's experts, or of its merged ones."""
        gate_up, down = self.gate_up.flatten(1, 2), self.down
        if merge is None:
            return self.kernels.moe_mlp(x, gate_up, down, expert_ids, weights)
        return self.kernels.moe_mlp(x, _merged(merge.gate_up, gate_up), _merged(merge.down, down), expert_ids, weights)


class ReluExperts(nn.Module):
    """E MLPs y = W_down relu(W_up x + b) + c: `up` [E, F, D], `down` [E, D, F]. Biases are one-dimensional: these are not decayed."""

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.hidden_size, config.ffn_hidden_size
        self.count = count
        self.up = nn.Parameter(torch.empty(count, width, size))
        self.up_bias = nn.Parameter(torch.empty(count * width))
        self.down = nn.Parameter(torch.empty(count, size, width))
        self.down_bias = nn.Parameter(torch.empty(count * size))
        self.initial: dict[str, Initial] = {name: Stack(Normal(config.init_std)) for name in ("up", "down")}
        self.initial |= {"up_bias": Constant(0.0), "down_bias": Constant(0.0)}
        self.kernels = kernels

    def forward(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, merge: Merge | None = None, drop: Drop | None = None
    ) -> Tensor:
        """x [T, D], expert_ids and weights [T, K] -> [T, D]: the weighted sum of each token's experts, or of its merged ones."""
        up, down = self._with_bias(self.up, self.up_bias), self._with_bias(self.down, self.down_bias)
        if merge is not None:
            up, down = _merged(merge.gate_up, up), _merged(merge.down, down)
        kernels, plan = self.kernels, self.kernels.sort_by_expert(expert_ids, len(up))
        hidden = kernels.grouped_mm(_with_one(kernels.permute(x, plan)), up, plan).relu()
        if drop is not None:
            hidden = drop(hidden, plan)
        return kernels.unpermute(kernels.grouped_mm(_with_one(hidden), down, plan), plan, weights)

    def _with_bias(self, weight: Tensor, bias: Tensor) -> Tensor:
        """[E, N, C] and [E * N] -> [E, N, C + 1]: a bias is the weight of a constant input."""
        return torch.cat([weight, bias.view(self.count, -1, 1)], -1)


def _with_one(rows: Tensor) -> Tensor:
    """[M, C] -> [M, C + 1]."""
    return F.pad(rows, (0, 1), value=1.0)


def _merged(shares: Tensor, weight: Tensor) -> Tensor:
    """shares [n, E], weight [E, a, b] -> [n, a, b]."""
    return (shares.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
