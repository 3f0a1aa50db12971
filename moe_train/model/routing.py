"""The router contract: what a router is given, what it decides, and what crosses layers.

Shapes: B rows, S positions, S_local positions held by this rank, T = B * S_local tokens, D hidden, E experts, K choices,
R floats of router state per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig, RouterConfig


class Carry(NamedTuple):
    """What goes from block to block and from pipeline stage to pipeline stage."""

    hidden: Tensor  # [B, S_local, D] residual stream, compute dtype
    state: Tensor  # [B, S_local, R] router state, fp32 (fp64 in an fp64 model); R = 0 when stateless
    loss: Tensor  # [1] fp32 (or fp64), running sum of weighted router losses


class Segments(NamedTuple):
    """The documents of packed rows, in the form that the device's attention takes: one of the two is there."""

    mask: Tensor | None = None  # [B, 1, S, S] bool, True where a query sees a key
    bounds: Tensor | None = None  # [n + 1] int32, first token of each document in the flattened rows, then B * S


@dataclass(frozen=True)
class BatchInfo:
    """Facts about a micro-batch: read-only, the same on every pipeline stage and on all ranks that share these rows."""

    tokens: Tensor  # [B, S] int64
    positions: Tensor  # [B, S] int64, from 0 in each document
    doc_ids: Tensor  # [B, S] int64, number of the document inside its row, from 0
    labels: Tensor  # [B, S] int64, the document's source, 0 if unknown
    rows: Tensor  # [B] int64, global row numbers
    segments: Segments | None  # which keys a query sees when rows pack several documents; None = causal over the whole row
    token_count: int = 1  # real tokens of the whole optimizer step, over all ranks
    target_count: int = 1  # target tokens of the whole optimizer step, over all ranks

    def sum(self, x: Tensor) -> Tensor:
        """Differentiable sum over the ranks that share these rows; they are on one rank, so this is x."""
        return x


class Routing(NamedTuple):
    """What a router decides for T tokens."""

    weights: Tensor  # [T, K]
    expert_ids: Tensor  # [T, K] int32; -1 is an empty slot, which every kernel skips
    state: Tensor  # [B, S_local, R] for the next layer's router
    losses: dict[str, Tensor]  # unweighted [], summed over local tokens; weights are RouterConfig.loss_weights
    stats: dict[str, Tensor]  # detached local sums; the engine sums them over micro-batches and ranks for after_step
    memory: Any = None  # decoding only: what later tokens of a sequence need


class Router(nn.Module):
    """Base of every router. A forward pass changes nothing; `after_step` is the only place where buffers change."""

    registry: ClassVar[dict[type[RouterConfig], type[Router]]] = {}
    state_grad: ClassVar[bool] = True  # False where the state is assignments and not a function with a gradient

    def __init__(self, config: RouterConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels

    @staticmethod
    def state_size_of(config: Any) -> int:
        """R: floats of state per token; static, so that a pipeline can size its buffers."""
        return 0

    @staticmethod
    def make_shared(config: Any, model: ModelConfig, kernels: Backend) -> nn.Module | None:
        """A module that all layers share, or None."""
        return None

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Any = None) -> Routing:
        """x [B, S_local, D] normed hidden rows, state [B, S_local, R] -> Routing."""
        raise TypeError(f"{type(self).__name__} has no forward")

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Update buffers from the whole step's `stats` of this layer; `progress` is the share of training done."""


SomeRouter = TypeVar("SomeRouter", bound=type[Router])


def register(config: type[RouterConfig]) -> Callable[[SomeRouter], SomeRouter]:
    """Class decorator: this router is what `config` describes."""

    def add(router: SomeRouter) -> SomeRouter:
        Router.registry[config] = router
        return router

    return add


def router_class(config: RouterConfig) -> type[Router]:
    """The router that a configuration describes."""
    return Router.registry[type(config)]
