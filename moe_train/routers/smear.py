"""SMEAR: soft merging of experts with adaptive routing (arXiv 2306.03745), in a causal form.

A unit of tokens (a segment; `causal: false`: a document) is routed at once. The experts' parameters are averaged by the routing
probabilities, and the unit goes through the one merged expert, so that everything is differentiable at about the cost of one expert:

    v = mean of the previous segment's hidden rows                        (section 3; published: of the example itself)
    p = softmax(LN(v) LN(R)^T)                                            R: [E, D]; see pooling.py
    p = (p m + 1e-10) / sum(p m + 1e-10), m_e ~ Bernoulli(1 - dropout)    expert dropout, in training, one m for each unit
    W_u = sum_e p_ue W_e for each of an expert's three matrices;  y_t = SwiGLU(x_t; W_u(t))

State: none. Decoding: the open segment's sum and its features. Cost: 2 * 3 D F FLOP per token for the merged expert, and E /
segment_size times that for merging; 3 D F numbers of merged parameters per segment; a sum of B * segments * D numbers over the ranks
that share rows.

Departures: the published experts are adapters behind each sublayer, x + LN(silu(x A + a) B), and in a decoder all of them read the
encoder's mean; here they are the layer's own experts, without that norm.

Traps: the published form pools the whole example, which in a language model shows each token its future; it stays as `causal: false`
and says so. A document that is shorter than segment_size + 1 never asks the router. Padding is a document of its own. Under expert
parallelism merging would have to gather every expert again; it is refused. With nonlinear experts merging is not an ensemble: for
experts silu(x) and silu(-x), p = (1/2, 1/2) and x = 2 it gives 0, the ensemble 0.76. Published init: R ~ N(0, 0.01^2), whose layer norm
(eps 1e-5) then has deviation 0.953 and not 1.
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig, Probability
from moe_train.model.experts import Merge
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.merging import MergingConfig, MergingRouter
from moe_train.routers.pooling import Gate, Memory, PooledConfig, draw, find_units


class SmearConfig(MergingConfig, PooledConfig):
    """SMEAR's keys."""

    name: Literal["smear"] = "smear"
    """SMEAR: experts merged by routing probabilities, once per segment"""
    segment_size: PositiveInt = 64
    """tokens that share a merged expert, chosen from the mean of as many tokens before them"""
    expert_dropout: Probability = 0.1
    """probability that an expert is left out of a merge, in training"""


@register(SmearConfig)
class SmearRouter(MergingRouter):
    """One layer of SMEAR; see the module's docstring."""

    config: SmearConfig

    def __init__(self, config: SmearConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.gate = Gate(config, model.hidden_size, model.num_experts)
        self.merged = 3 * model.num_experts * model.hidden_size * model.ffn_hidden_size  # entries that a merge reads

    def active_params(self) -> int:
        """Gate and merge, once for each segment (never, where a segment is a document of unknown length)."""
        return (super().active_params() + self.merged) // self.config.segment_size if self.config.causal else 0

    def forward(
        self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Memory | None = None
    ) -> Routing:
        """x [B, S_local, D] -> Routing with merged experts; `state` passes through."""
        units = find_units(x, batch, self.config, memory)
        probs = self.gate(units).softmax(-1)
        if self.training and self.config.expert_dropout:
            uniform = draw(batch, units.places, "expert_dropout", self.layer, probs.shape[1])
            probs = drop_experts(probs, uniform >= self.config.expert_dropout)
        return self.merge(Merge(probs, probs), units.ids, state, units.memory)


def drop_experts(probs: Tensor, kept: Tensor) -> Tensor:
    """probs [U, E] over the experts that are kept [U, E]; uniform where none is."""
    masked = probs * kept + 1e-10
    return masked / masked.sum(-1, keepdim=True)
