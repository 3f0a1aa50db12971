"""Dropping over capacity: which choices, against a loop; what is causal; and that the limit holds per row."""

import math
from typing import Any

import pytest
import torch
from models import TOPK, batch_of, config_of, decoder_of, make_batch
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.model.capacity import drop_over_capacity
from moe_train.model.routing import BatchInfo, Routing


def model_of(factor: float, policy: str = "position", **model: Any) -> ModelConfig:
    return config_of(TOPK, capacity_factor=factor, drop_policy=policy, **model).model


def routing_of(rows: int, length: int, choices: int, experts: int, seed: int = 0) -> tuple[Routing, BatchInfo]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows * length, experts, generator=generator).argsort(1)[:, :choices].int()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    weights = torch.rand(ids.shape, generator=generator)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    positions = torch.arange(length).expand(rows, length)
    return Routing(weights, ids, weights, {}, {}), make_batch(tokens, positions, tokens)


def dropped_by_loop(ids: Tensor, weights: Tensor, rows: int, capacity: int, policy: str) -> Tensor:
    """Go through each row's choices in the order of the policy, and fill the experts."""
    gone = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(rows):
        part = slice(row * len(ids) // rows, (row + 1) * len(ids) // rows)
        places = [(t, k) for t in range(part.start, part.stop) for k in range(ids.shape[1])]
        if policy == "score":
            places.sort(key=lambda p: -weights[p].item())
        taken: dict[int, int] = {}
        for place in places:
            expert = int(ids[place])
            taken[expert] = taken.get(expert, 0) + 1
            gone[place] = expert >= 0 and taken[expert] > capacity
    return gone


@pytest.mark.parametrize("policy", ["position", "score"])
@pytest.mark.parametrize("factor", [0.25, 0.7, 1.0, 4.0])
def test_drops_what_a_loop_drops(policy: str, factor: float) -> None:
    routing, batch = routing_of(3, 16, 2, 4)
    limited = drop_over_capacity(routing, batch, model_of(factor, policy))
    gone = dropped_by_loop(routing.expert_ids, routing.weights, 3, math.ceil(factor * 16 * 2 / 4), policy)
    assert torch.equal(limited.expert_ids, torch.where(gone, -1, routing.expert_ids))
    assert torch.equal(limited.weights, torch.where(gone, 0.0, routing.weights))
    assert int(limited.stats["dropped"]) == int(gone.sum())
    assert (factor < 1) == bool(gone.any()) or factor == 1.0


def test_several_rows_per_token_share_the_limit() -> None:
    routing, batch = routing_of(2, 8, 2, 4)
    again, _ = routing_of(2, 8, 2, 4, seed=1)
    both = routing._replace(
        expert_ids=torch.cat([routing.expert_ids, again.expert_ids]), weights=torch.cat([routing.weights, again.weights])
    )
    limited = drop_over_capacity(both, batch, model_of(0.5))
    loads = limited.expert_ids.view(2, 2, 8, 2).movedim(0, 1).reshape(2, -1)
    assert all(int((row == e).sum()) <= math.ceil(0.5 * 8 * 4 / 4) for row in loads for e in range(4))
    assert limited.expert_ids.shape == both.expert_ids.shape


@pytest.mark.parametrize(("policy", "causal"), [("position", True), ("score", False)])
def test_only_the_position_policy_is_causal(policy: str, causal: bool) -> None:
    model = decoder_of(model_of(0.3, policy, num_layers=2))
    batch, _ = batch_of([[24]])
    before = model(batch).logits
    moved = False
    for position in range(12, 24):
        for token in range(4):
            tokens = batch.tokens.clone()
            tokens[0, position] = token
            after = model(make_batch(tokens, batch.positions, batch.doc_ids)).logits
            moved |= bool((after - before)[0, :position].abs().max() > 1e-9)
    assert moved == (not causal)


def test_other_rows_change_nothing() -> None:
    model = decoder_of(model_of(0.3))
    batch, _ = batch_of([[12], [12]])
    alone = make_batch(batch.tokens[:1], batch.positions[:1], batch.doc_ids[:1])
    torch.testing.assert_close(model(batch).logits[:1], model(alone).logits, rtol=1e-9, atol=1e-12)
