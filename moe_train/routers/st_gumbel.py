"""One expert by the straight-through Gumbel-softmax estimator, as SMEAR's authors compare it (arXiv 2306.03745, section 4).

    s = LN(v) LN(R)^T                                   as in pooling.py; v is the token itself by default
    q = softmax((s + g) / tau), g ~ Gumbel(0, 1);  i = argmax q        in training: a sample from softmax(s), whatever tau is
    y = (1 + q_i - sg(q_i)) Expert_i(x)                 forward scale exactly 1; the gradient goes through q_i alone
    y = Expert_i(x), i = argmax s                       in evaluation

tau falls from `temperature` to `temperature_floor` with the optimizer steps done, updated every `temperature_every` steps: tau0
exp(-rate step). The published code multiplies the temperature that has already fallen by exp(-rate step) again
(`temperature_compounds`), which reaches its floor much earlier: with its T5 figures (rate 1e-6, every 5000) at step 175,000 instead of
3.0 million, with its ResNet figures (1e-4, every 1000) at 8,000 instead of 30,000. The straight-through form of arXiv 1611.01144
passes the gradient of the whole one-hot; this one passes that of the chosen expert's share only.

State: none. Cost: one expert; 2 D E FLOP per token for the gate, in fp32. Traps: the estimator is biased; a high temperature makes
its gradient small (1 / tau) without changing what is sampled; nothing balances the experts.
"""

import math
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.pooling import GatedRouter, Memory, PooledConfig, choose_one, draw, find_units, gumbel


class StGumbelConfig(PooledConfig):
    """Keys of the straight-through Gumbel router."""

    name: Literal["st_gumbel"] = "st_gumbel"
    """one expert, sampled, with the straight-through Gumbel-softmax gradient"""
    top_k: Literal[1] = 1
    """one expert per token"""
    temperature: PositiveFloat = 10.0
    """temperature at the first step"""
    temperature_floor: PositiveFloat = 0.5
    """lowest temperature"""
    temperature_rate: NonNegativeFloat = 1e-4
    """rate of the exponential fall, per step"""
    temperature_every: PositiveInt = 1000
    """steps between updates of the temperature"""
    temperature_compounds: bool = False
    """true = as the published code, each update multiplies the temperature that has already fallen"""

    def temperature_at(self, step: int) -> float:
        """The temperature after `step` optimizer steps."""
        updates = step // self.temperature_every
        steps = self.temperature_every * (updates * (updates + 1) / 2 if self.temperature_compounds else updates)
        return max(self.temperature * math.exp(-self.temperature_rate * steps), self.temperature_floor)


@register(StGumbelConfig)
class StGumbelRouter(GatedRouter):
    """One layer; see the module's docstring."""

    config: StGumbelConfig

    def forward(
        self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Memory | None = None
    ) -> Routing:
        """x [B, S_local, D] -> Routing to one expert; `state` passes through."""
        units = find_units(x, batch, self.config, memory)
        logits = self.gate(units)
        if not self.training:
            return choose_one(units, logits, logits.argmax(-1), torch.ones_like(logits[:, 0]), state)
        uniform = draw(batch, units.places, "gumbel", self.layer, logits.shape[1])
        chosen, scale = straight_through(logits + gumbel(uniform).to(logits.dtype), self.config.temperature_at(batch.step))
        return choose_one(units, logits, chosen, scale, state)


def straight_through(noisy: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """noisy logits [U, E] -> the chosen expert [U], and its scale [U]: 1, with the gradient of its share."""
    q, chosen = (noisy / temperature).softmax(-1).max(-1)
    return chosen, 1 + (q - q.detach())
