"""The mixture-of-experts layer: route, mix, and add the shared expert. Shapes: B rows, S positions, D hidden, R router state."""

from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.experts import Experts
from moe_train.model.layers import SwiGLU
from moe_train.model.routing import BatchInfo, Routing, router_class


class MoE(nn.Module):
    """Router, experts and an optional shared expert that every token visits."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.router = router_class(config.router)(config.router, config, layer, kernels)
        self.experts = Experts(config, kernels)
        self.shared_expert = None
        if config.shared_expert_size:
            self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_size, config.init_std, kernels)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None) -> tuple[Tensor, Routing]:
        """x [B, S, D], state [B, S, R] -> ([B, S, D], what the router decided)."""
        routing: Routing = self.router(x, state, batch, shared)
        out = self.experts(x.flatten(0, 1), routing.expert_ids, routing.weights).view_as(x)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out, routing
