"""The experts of one layer: SwiGLU MLPs in two stacked weights. Shapes: T tokens, D hidden, F expert width, E experts, K choices."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Normal


class Merge(NamedTuple):
    """How n experts are mixed from the parameters of all E."""

    gate_up: Tensor  # [n, E] each expert's share in the n gate and up projections
    down: Tensor  # [n, E] the same for the down projections


class Experts(nn.Module):
    """E SwiGLU MLPs: `gate_up` [E, 2, F, D] (gate, then up), `down` [E, D, F]."""

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.hidden_size, config.ffn_hidden_size
        self.count = count
        self.gate_up = nn.Parameter(torch.empty(count, 2, width, size))
        self.down = nn.Parameter(torch.empty(count, size, width))
        self.initial = {"gate_up": Normal(config.init_std), "down": Normal(config.init_std)}
        self.kernels = kernels

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor, merge: Merge | None = None) -> Tensor:
        """x [T, D], expert_ids and weights [T, K] -> [T, D]: the weighted sum of each token's experts, or of its merged ones."""
        gate_up, down = self.gate_up.flatten(1, 2), self.down
        if merge is None:
            return self.kernels.moe_mlp(x, gate_up, down, expert_ids, weights)
        return self.kernels.moe_mlp(x, _merged(merge.gate_up, gate_up), _merged(merge.down, down), expert_ids, weights)


def _merged(shares: Tensor, weight: Tensor) -> Tensor:
    """shares [n, E], weight [E, a, b] -> [n, a, b]."""
    return (shares.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
