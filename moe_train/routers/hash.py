"""Hash layers: a token's id decides, and nothing is learned (arXiv 2106.04426, section 3).

    ids = the top_k experts by hash(token id, layer, expert);   w = 1 / top_k

Each layer deals the vocabulary to the experts in another way. No router parameters, no losses, and no gradient through the
choice; the same token goes to the same experts wherever it stands. (SMEAR's authors, arXiv 2306.03745, hash whole examples instead.)

State: none. Cost per token: E hashes. Traps: word frequencies are Zipf's, so loads are not balanced, and no loss can change that.
"""

import hashlib
from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig, RouterConfig
from moe_train.model.routing import BatchInfo, Router, Routing, register, scramble
from moe_train.routers.balance import count_choices


class HashConfig(RouterConfig):
    """Keys of hash routing."""

    name: Literal["hash"] = "hash"
    """by token id alone"""
    hash_seed: NonNegativeInt = 0
    """which of the ways to deal the vocabulary to the experts"""


@register(HashConfig)
class HashRouter(Router):
    """Hash layer; see the module's docstring."""

    config: HashConfig

    def __init__(self, config: HashConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.num_experts = model.num_experts
        self.key = int.from_bytes(hashlib.sha256(f"{config.hash_seed}/{layer}".encode()).digest()[:7], "little")

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D], of which only the shape counts -> Routing; `state` passes through."""
        tokens = batch.here(batch.tokens).reshape(-1, 1)
        experts = torch.arange(self.num_experts, device=tokens.device)
        expert_ids = scramble(scramble(tokens + self.key) + experts).topk(self.config.top_k, -1).indices.int()
        weights = torch.full(expert_ids.shape, 1.0 / self.config.top_k, device=x.device, dtype=state.dtype)
        stats = {"tokens_per_expert": count_choices(expert_ids.view(1, -1), self.num_experts)[0]}
        return Routing(weights, expert_ids, state, {}, stats)
