"""DSelect-k: differentiable selection of experts with a smooth step (arXiv 2106.03760), as SMEAR's authors compare it.

Each of k selectors holds a binary code z of m = ceil(log2 E) bits, made from the token:

    z_j = LN(v) Z_j                                     Z_j: [D, m]; v is the token itself by default, see pooling.py
    S(z) = 0 for z <= -g/2, 1 for z >= g/2, else -2 z^3 / g^3 + 3 z / (2 g) + 1/2            (equation 5; g = `gamma`)
    r_je = product over bits of S(z) where e has the bit, else 1 - S(z); bit 0 is the least significant   (equation 4)
    w_e = sum_j a_j r_je,  a = softmax(LN(v) A)         A: [D, k]; 1 for a single selector, which needs none
    y = sum_e w_e Expert_e(x), in training and in evaluation

The regulariser, per selector and token, is the entropy -sum_e r_e ln(r_e + 1e-6), which drives the codes to 0 and 1, and, where E is no
power of two, 1 / sum_e r_e over the real experts, which drives mass away from codes without an expert.

State: none. Cost: all E experts until codes have reached 0 or 1; an expert whose weight is exactly 0 is skipped (id -1). Traps: a bit
outside (-g/2, g/2) gets no gradient and never moves again but by weight decay and the hidden rows; where E is no power of two the
weights sum to less than 1. In the published comparison's decoder, v pooled the decoder's own states and so showed each token its
future.
"""

import math
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import Conflict, ModelConfig
from moe_train.model.routing import BatchInfo, Router, Routing, register
from moe_train.routers.pooling import Gate, Memory, PooledConfig, find_units, unit_stats


class DSelectKConfig(PooledConfig):
    """DSelect-k's keys."""

    name: Literal["dselect_k"] = "dselect_k"
    """DSelect-k: binary codes through a smooth step"""
    top_k: PositiveInt = 1
    """selectors"""
    gamma: PositiveFloat = 1.0
    """width of the smooth step"""
    regularizer_weight: NonNegativeFloat = 0.1
    """weight of the selectors' regulariser"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """A code needs a bit."""
        found = super().conflicts(model)
        if model.num_experts < 2:
            rule = "dselect_k needs at least 2, so that a code has a bit"
            found.append(Conflict("model.num_experts", model.num_experts, rule, "add experts or use router monolithic"))
        return found

    def active_experts(self, model: ModelConfig) -> int:
        """All, as long as codes are between 0 and 1."""
        return model.num_experts

    def loss_weights(self) -> dict[str, float]:
        """Weight of the regulariser."""
        return {"regularizer": self.regularizer_weight}


@register(DSelectKConfig)
class DSelectKRouter(Router):
    """One layer; see the module's docstring."""

    config: DSelectKConfig

    def __init__(self, config: DSelectKConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.num_experts, self.bits = model.num_experts, math.ceil(math.log2(model.num_experts))
        mixing = config.top_k if config.top_k > 1 else 0
        self.gate = Gate(config, model.hidden_size, config.top_k * self.bits + mixing, normed=False)

    def forward(
        self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Memory | None = None
    ) -> Routing:
        """x [B, S_local, D] -> Routing to all experts with weight; `state` passes through."""
        units = find_units(x, batch, self.config, memory)
        codes, mixing = self.gate(units).tensor_split((self.config.top_k * self.bits,), -1)
        probs = expert_probs(smooth_step(codes.unflatten(-1, (-1, self.bits)), self.config.gamma), self.num_experts)
        share = mixing.softmax(-1)[..., None] if self.config.top_k > 1 else 1.0
        weights = (share * probs).sum(1)
        losses = {"regularizer": regularizer(probs)[units.ids].sum()}
        expert_ids = torch.where(weights > 0, torch.arange(self.num_experts, device=x.device), -1).int()
        stats = unit_stats(weights, weights, units.ids)
        return Routing(weights[units.ids], expert_ids[units.ids], state, losses, stats, units.memory)


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """0 below -gamma / 2, 1 above gamma / 2, a cubic between."""
    inside = -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 0.5
    return torch.where(z <= -gamma / 2, 0, torch.where(z >= gamma / 2, 1, inside))


def expert_probs(bits: Tensor, num_experts: int) -> Tensor:
    """Probability of each expert's number from the probabilities that its bits are 1: [U, k, m], lowest bit first -> [U, k, E]."""
    experts = torch.arange(num_experts, device=bits.device)[:, None]
    wanted = (experts >> torch.arange(bits.shape[-1], device=bits.device)) & 1
    bits = bits[..., None, :]
    return torch.where(wanted.bool(), bits, 1 - bits).prod(-1)


def regularizer(probs: Tensor) -> Tensor:
    """probs [U, k, E] -> [U], summed over selectors."""
    entropy = -(probs * (probs + 1e-6).log()).sum(-1)
    if probs.shape[-1] & (probs.shape[-1] - 1):
        entropy = entropy + 1 / probs.sum(-1).clamp_min(1e-6)
    return entropy.sum(-1)
