"""AdaMix: random experts in training, their mean afterwards (arXiv 2205.12410), as SMEAR's authors compare it.

In training each row of the batch goes through the network twice. In each pass and layer a row draws two experts, one for its gate and
up projections and one, independently, for its down projection; in evaluation all experts are averaged into one:

    training     i, j ~ U{1..E} for each row, pass and layer;  y = W_down,j SwiGLU(W_gate_up,i x)
    evaluation   y = SwiGLU(x; mean of the experts' parameters)
    loss = mean over both passes of the cross entropy + consistency_weight * (KL(p1 || p2) + KL(p2 || p1)) / 2

p1 and p2 are a token's predictions in the two passes; the last term is a sum over target tokens divided by the step's target tokens.

State: none. Cost: training runs every row twice, and the head's logits four times; evaluation costs one expert. Traps: experts that are
far apart have a bad mean, which the consistency term is there to prevent; the two passes are one micro-batch of twice the rows, so the
memory of activations doubles; the term needs both passes' final hidden rows whole on one rank, so pipeline, tensor and context
parallelism are refused.
"""

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import Conflict, ModelConfig, ParallelSection
from moe_train.model.experts import Merge
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.merging import MergingConfig, MergingRouter


class AdaMixConfig(MergingConfig):
    """AdaMix's keys."""

    name: Literal["adamix"] = "adamix"
    """AdaMix: random experts in two passes that must agree; their mean in evaluation"""
    consistency_weight: NonNegativeFloat = 1.0
    """weight of the disagreement of the two passes"""

    def layout_conflicts(self, parallel: ParallelSection) -> list[Conflict]:
        """The two passes meet at the head."""
        rule = (
            "router adamix compares two passes of each row at the head, which needs whole rows and the whole head on one rank"
        )
        axes = {"pp": parallel.pp, "tp": parallel.tp, "cp": parallel.cp}
        found = [Conflict(f"parallel.{axis}", n, rule, "use 1") for axis, n in axes.items() if n > 1]
        return super().layout_conflicts(parallel) + found

    def loss_weights(self) -> dict[str, float]:
        """Weight of the consistency term."""
        return {"consistency": self.consistency_weight}


@register(AdaMixConfig)
class AdaMixRouter(MergingRouter):
    """One layer; see the module's docstring. It has no parameters."""

    config: AdaMixConfig
    two_passes: ClassVar[bool] = True

    def __init__(self, config: AdaMixConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.num_experts = model.num_experts

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S, D] -> Routing with a random expert for each row, or the mean of all; `state` passes through."""
        rows, length = x.shape[:2]
        if not self.training:
            mean = torch.full((1, self.num_experts), 1 / self.num_experts, dtype=state.dtype, device=x.device)
            return self.merge(Merge(mean, mean), torch.zeros(rows * length, dtype=torch.int64, device=x.device), state)
        chosen = (
            batch.random("experts", self.layer, 2)[:, 0] * self.num_experts
        ).long()  # whole rows are here: pp = tp = cp = 1
        gate_up, down = F.one_hot(chosen, self.num_experts).to(state.dtype).unbind(1)
        ids = torch.arange(rows, device=x.device).repeat_interleave(length)
        return self.merge(Merge(gate_up, down), ids, state)
