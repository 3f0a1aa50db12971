"""The mixture-of-experts layer: a router, experts and a shared expert. Shapes: B rows, S positions, T = B * S, D hidden, K choices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.capacity import drop_over_capacity
from moe_train.model.experts import Drop, Experts, Merge, ReluExperts
from moe_train.model.layers import SwiGLU
from moe_train.model.routing import BatchInfo, Carry, Routing, router_class

LayerStats = dict[str, Tensor]  # detached local sums of one layer; empty for a dense one


def run_directly(part: Callable[..., Any], *args: Any) -> Any:
    """How a block runs its parts where nothing is recomputed."""
    return part(*args)


class Dispatcher(Protocol):
    """How rows come to their experts and back: on this rank alone, or over the ranks that share the experts."""

    def plan(self, expert_ids: Tensor) -> Any:
        """What `dispatch` needs to know about the ids [n, K]; made once per forward, never recomputed."""
        ...

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
        """rows [n, D] -> the rows that this rank's experts work on, their local ids (-1: another rank's) and weights."""
        ...

    def combine(self, rows: Tensor, plan: Any) -> Tensor:
        """This rank's experts' results -> [n, D], each row's sum over all ranks."""
        ...


class LocalDispatcher:
    """All experts are here."""

    def plan(self, expert_ids: Tensor) -> None:
        """Nothing to plan."""

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, plan: None) -> tuple[Tensor, Tensor, Tensor]:
        """The identity."""
        return rows, expert_ids, weights

    def combine(self, rows: Tensor, plan: None) -> Tensor:
        """The identity."""
        return rows


class PlannedExperts(NamedTuple):
    """`moe_train.model.routing.ExpertCall` of one layer and one forward."""

    experts: Callable[..., Tensor]
    dispatcher: Dispatcher
    plan: Any

    def __call__(self, rows: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """rows [n, D], ids and weights [n, K] -> [n, D]."""
        there, ids, scale = self.dispatcher.dispatch(rows, expert_ids, weights, self.plan)
        return self.dispatcher.combine(self.experts(there, ids, scale), self.plan)

    def merged(self, rows: Tensor, merged_ids: Tensor, merge: Merge) -> Tensor:
        """rows [T, D], each through the merged expert that merged_ids [T, 1] names -> [T, D]. All experts must be here."""
        return self.experts(rows, merged_ids, rows.new_ones(merged_ids.shape), merge)


def run_in_turn(routed: Callable[[], Tensor], shared: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """One after the other."""
    return routed(), shared()


class MoE(nn.Module):
    """Router, experts and an optional shared expert that every token visits: the router decides, then `plan`, then `mix`.

    `run_both` runs the experts, with their plan, and the shared expert; parallelism replaces it, to hide communication and the wait
    for row counts, as it does `dispatcher`.
    """

    run_both: Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[Tensor, Tensor]]

    def __init__(self, config: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.router = router_class(config.router)(config.router, config, layer, kernels)
        if config.router.frozen:
            self.router.requires_grad_(False)
        self.config = config
        self.experts = Experts(config, kernels) if config.block == "llama" else ReluExperts(config, kernels)
        if config.frozen_experts:
            self.experts.requires_grad_(False)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.run_both = run_in_turn
        self.shared_expert = None
        if config.shared_expert_size:
            self.shared_expert = SwiGLU(config.hidden_size, config.shared_expert_size, config.init_std, kernels)

    def forward(
        self,
        x: Tensor,
        carry: Carry,
        batch: BatchInfo,
        shared: nn.Module | None,
        run: Callable[..., Any],
        memory: Any = None,
        drop: Drop | None = None,
    ) -> tuple[Tensor, Carry, LayerStats, Any]:
        """x [B, S, D] -> the layer's output, `carry` with the router's state and losses, statistics, and the router's memory.

        `run` runs the costly part, which recomputation may run again; `drop` is for the experts' hidden units (ReLU experts).
        """
        routing = self.router(x, carry.state, batch, shared, memory)
        if self.config.capacity_factor is not None:
            routing = drop_over_capacity(routing, batch, self.config)
        routed = partial(self.run_routed, x, routing, run, drop)
        shared_expert = self.shared_expert
        out = routed() if shared_expert is None else torch.add(*self.run_both(routed, partial(run, shared_expert, x)))
        weights = self.router.config.loss_weights()
        loss = carry.loss
        for name, value in routing.losses.items():
            loss = loss + (weights[name] / batch.token_count) * value
        losses = {f"{name}_loss": value.detach() for name, value in routing.losses.items()}
        return out, carry._replace(state=routing.state, loss=loss), routing.stats | losses, routing.memory

    def plan(self, routing: Routing) -> PlannedExperts:
        """The experts, ready for what the router decided. Ranks may exchange row counts here."""
        return PlannedExperts(self.experts, self.dispatcher, self.dispatcher.plan(routing.expert_ids))

    def run_routed(self, x: Tensor, routing: Routing, run: Callable[..., Any], drop: Drop | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D], what the chosen experts make of it. `plan` is part of this and not of what `run` may run again:
        a rank may wait in it for row counts, while a shared expert that `run_both` has started computes."""
        experts = self.plan(routing)
        if drop is not None:
            experts = experts._replace(experts=partial(self.experts, drop=drop))
        out: Tensor = run(self.mix, x, routing, experts)
        return out

    def mix(self, x: Tensor, routing: Routing, experts: PlannedExperts) -> Tensor:
        """x [B, S, D], what the router decided and `plan` gave -> [B, S, D], without the shared expert."""
        return self.router.mix(x, routing, experts)
