"""Experts with a limit: choices beyond an expert's capacity are dropped, which means that their slots become empty.

The limit holds per row, so that no layout changes what is dropped: an expert takes at most factor * S K / E of a row's S K choices.
`position` drops the latest ones in the row and is causal; `score` drops the ones with the lowest weights, and a later token can then
push an earlier one out.

Shapes: B rows, S positions, S_local of them here, T = B * S_local, K choices, n rows to the experts per token (usually 1).
"""

import math

import torch
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.model.routing import BatchInfo, Routing


def drop_over_capacity(routing: Routing, batch: BatchInfo, config: ModelConfig) -> Routing:
    """`routing` with ids -1 and weights 0 where an expert is full, and the number of them as the statistic `dropped` []."""
    assert config.capacity_factor is not None
    ids, weights = (_by_row(x, batch) for x in (routing.expert_ids, routing.weights.detach()))
    whole = batch.whole(ids)
    capacity = math.ceil(config.capacity_factor * whole[0].numel() / config.num_experts)
    first = batch.whole(weights) if config.drop_policy == "score" else None
    places = _places(whole.flatten(1), None if first is None else first.flatten(1)).view_as(whole)
    full = (batch.here(places) >= capacity) & (ids >= 0)
    over = _by_token(full, routing.expert_ids)
    return routing._replace(
        expert_ids=torch.where(over, -1, routing.expert_ids),
        weights=torch.where(over, 0, routing.weights),
        stats=routing.stats | {"dropped": full.sum()},
    )


def _by_row(x: Tensor, batch: BatchInfo) -> Tensor:
    """[n T, K] -> [B, S_local, n K]."""
    rows, length = batch.here(batch.tokens).shape
    return x.view(-1, rows, length, x.shape[1]).movedim(0, 2).flatten(2)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """[B, S_local, n K] -> [n T, K]."""
    return x.unflatten(2, (-1, like.shape[1])).movedim(2, 0).reshape(like.shape)


def _places(ids: Tensor, scores: Tensor | None) -> Tensor:
    """How many choices of a row [B, m] went to the same expert before each one: in order, or by descending score."""
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if scores is not None:
        order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))  # by expert, and within one as before
    grouped = ids.gather(1, order)
    numbers = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.ones_like(grouped, dtype=torch.bool)
    starts[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    first = torch.where(starts, numbers, 0).cummax(1).values
    return torch.empty_like(numbers).scatter_(1, order, numbers - first)
