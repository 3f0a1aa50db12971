"""The experts of one layer: SwiGLU MLPs in two stacked weights. Shapes: T tokens, D hidden, F expert width, E experts, K choices."""

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Normal


class Experts(nn.Module):
    """E SwiGLU MLPs: `gate_up` [E, 2F, D] (gate rows first), `down` [E, D, F]."""

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.hidden_size, config.ffn_hidden_size
        self.gate_up = nn.Parameter(torch.empty(count, 2 * width, size))
        self.down = nn.Parameter(torch.empty(count, size, width))
        self.initial = {"gate_up": Normal(config.init_std), "down": Normal(config.init_std)}
        self.kernels = kernels

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], expert_ids and weights [T, K] -> [T, D]: the weighted sum of each token's experts."""
        return self.kernels.moe_mlp(x, self.gate_up, self.down, expert_ids, weights)
