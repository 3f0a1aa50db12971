"""One expert by REINFORCE with a learned baseline, as SMEAR's authors compare it (arXiv 2306.03745, section 4; Williams, 1992).

    p = softmax(LN(v) LN(R)^T)                          as in pooling.py; v is the token itself by default
    i ~ Cat(p) in training, argmax p in evaluation;  y = Expert_i(x)
    b = sg(LN(v)) U W + c                               baseline, U: [D, D / 8], W: [D / 8, 1], no nonlinearity between
    loss = policy_weight * mean(ln p_i sg(l - b)) - entropy_weight * mean H(p) + baseline_weight * mean(Huber(l - b))

l is the token's own cross entropy, known only at the head, where `readout` adds the two terms that need it; the means are over the
layers with experts, and over tokens as everywhere. Tokens without a target have no reward and are left out.

State: ln p_i and b of every layer with experts, two columns for each, so that the terms cross pipeline stages with the hidden rows.
Cost: one expert; 2 D (E + D / 8) FLOP per token for gate and baseline, in fp32.

Traps: the published code adds +H, which lowers the entropy; here entropy_weight > 0 is the usual bonus, and a negative one is the
published sign. A token's choice changes later tokens too, through attention, and gets no credit for that. The estimate of the policy
gradient is unbiased for any baseline that does not depend on the choice (for the tokens' own losses); its variance is large.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.pooling import GatedRouter, Memory, PooledConfig, choose_one, draw, find_units, gumbel


class ReinforceConfig(PooledConfig):
    """Keys of the REINFORCE router."""

    name: Literal["reinforce"] = "reinforce"
    """one expert, sampled, with the REINFORCE gradient and a learned baseline"""
    top_k: Literal[1] = 1
    """one expert per token"""
    policy_weight: NonNegativeFloat = 0.01
    """weight of the policy gradient's term"""
    baseline_weight: NonNegativeFloat = 0.01
    """weight of the baseline's Huber loss"""
    entropy_weight: float = 5e-4
    """weight of the entropy bonus; negative = the published sign, which lowers the entropy"""

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss; the entropy is a bonus."""
        return {"policy": self.policy_weight, "baseline": self.baseline_weight, "entropy": -self.entropy_weight}


@register(ReinforceConfig)
class ReinforceRouter(GatedRouter):
    """One layer; see the module's docstring."""

    config: ReinforceConfig

    def __init__(self, config: ReinforceConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.column, self.layers = 2 * list(model.moe_layers).index(layer), len(model.moe_layers)
        width = max(model.hidden_size // 8, 1)
        self.baseline_in = nn.Parameter(torch.empty(width, model.hidden_size))
        self.baseline_out = nn.Parameter(torch.empty(1, width))
        self.baseline_bias = nn.Parameter(torch.empty(1))
        small = Normal(0.01)
        self.initial: dict[str, Initial] = {
            "baseline_in": small,
            "baseline_out": small,
            "baseline_bias": Constant(0.0),
        }

    @staticmethod
    def state_size_of(config: ReinforceConfig, model: ModelConfig) -> int:
        """ln p and baseline of each layer with experts."""
        return 2 * len(model.moe_layers)

    def forward(
        self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Memory | None = None
    ) -> Routing:
        """x [B, S_local, D], state [B, S_local, R] -> Routing to one expert, with this layer's columns of state filled in."""
        units = find_units(x, batch, self.config, memory)
        logits = self.gate(units)
        if self.training:
            noise = gumbel(draw(batch, units.places, "reinforce", self.layer, logits.shape[1]))
            chosen = (logits + noise.to(logits.dtype)).argmax(-1)
        else:
            chosen = logits.argmax(-1)
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)[units.ids].sum() / self.layers
        baseline = F.linear(self.gate.normalise(units.features).detach(), self.baseline_in)
        baseline = F.linear(baseline, self.baseline_out, self.baseline_bias)
        mine = torch.cat([log_probs.gather(1, chosen[:, None]), baseline], 1)[units.ids].unflatten(0, state.shape[:2])
        state = torch.cat([state[..., : self.column], mine.to(state.dtype), state[..., self.column + 2 :]], -1)
        return choose_one(units, logits, chosen, torch.ones_like(logits[:, 0]), state, entropy=entropy)

    @staticmethod
    def readout(config: ReinforceConfig, state: Tensor, token_loss: Tensor) -> dict[str, Tensor]:
        """The policy's and the baseline's terms: state [B, S_local, R], token_loss [B, S_local], 0 where there is no target."""
        log_probs, baseline = state.unflatten(-1, (-1, 2)).unbind(-1)  # [B, S_local, layers] each
        rewarded = (token_loss != 0).to(state.dtype)[..., None]
        loss = token_loss.to(state.dtype)[..., None].expand_as(baseline)
        policy = log_probs * (loss - baseline).detach()
        error = F.huber_loss(baseline, loss, reduction="none")
        return {name: (rewarded * term).mean(-1).sum() for name, term in (("policy", policy), ("baseline", error))}
