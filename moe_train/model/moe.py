"""The mixture-of-experts layer: a router, experts and a shared expert. Shapes: B rows, S positions, T = B * S, D hidden, K choices."""

from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.experts import Experts
from moe_train.model.layers import SwiGLU
from moe_train.model.routing import router_class


class MoE(nn.Module):
    """Router, experts and an optional shared expert that every token visits. The block calls the router, then `mix`."""

    def __init__(self, config: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.router = router_class(config.router)(config.router, config, layer, kernels)
        self.experts = Experts(config, kernels)
        self.shared_expert = None
        if config.shared_expert_size:
            self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_size, config.init_std, kernels)

    def mix(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """x [B, S, D] and what the router decided, [T, K] each -> [B, S, D]."""
        out = self.experts(x.flatten(0, 1), expert_ids, weights).view_as(x)
        return out if self.shared_expert is None else out + self.shared_expert(x)
