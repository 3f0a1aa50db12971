"""The schedule, the weight-decay groups, clipping, and the masks of packed rows."""

import itertools
import math

import pytest
import torch
from models import CPU, RECURRENT, batch_of, config_of, decoder_of

from moe_train.config import OptimSection
from moe_train.model.attention import document_bounds, find_segments
from moe_train.optim import clip_gradients, learning_rate, make_optimizer

SCHEDULE = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(1, 0.1), (5, 0.5), (10, 1.0), (55, 0.55), (100, 0.1), (32, 0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))],
)
def test_learning_rate(step: int, rate: float) -> None:
    assert learning_rate(SCHEDULE, step, 100) == pytest.approx(rate)


def test_the_schedule_rises_then_falls_and_never_leaves_its_bounds() -> None:
    rates = [learning_rate(SCHEDULE, step, 100) for step in range(1, 101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_without_min_lr_a_tenth_is_left() -> None:
    section = OptimSection(lr=2e-4, warmup_steps=10)
    assert section.conflicts() == []
    assert learning_rate(section, 100, 100) == pytest.approx(2e-5)
    assert learning_rate(OptimSection(lr=2e-4, min_lr=0.0, warmup_steps=10), 100, 100) == 0.0


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 3), (100, 100)])
def test_short_schedules(warmup: int, steps: int) -> None:
    section = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=warmup)
    assert all(0 < learning_rate(section, step, steps) <= 1.0 for step in range(1, steps + 1))


def test_only_matrices_decay() -> None:
    model = decoder_of(config_of(RECURRENT, qk_norm=True, shared_expert_size=8).model)
    decayed, kept = (group["params"] for group in make_optimizer(model, OptimSection(weight_decay=0.3)).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {id(p) for p in [*decayed, *kept]} == names.keys()
    assert sorted(names[id(p)] for p in kept if p.ndim > 1) == ["embedding.weight"]
    assert all("norm" not in names[id(p)] and "bias" not in names[id(p)] for p in decayed)


def test_a_tied_embedding_is_not_decayed_twice_or_at_all() -> None:
    model = decoder_of(config_of(tie_embeddings=True).model)
    decayed, kept = (group["params"] for group in make_optimizer(model, OptimSection()).param_groups)
    assert sum(p is model.embedding.weight for p in kept) == 1
    assert not any(p is model.embedding.weight for p in decayed)


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_clipping(limit: float | None) -> None:
    model = decoder_of(config_of().model)
    batch, targets = batch_of([[12]])
    model(batch, targets).loss.backward()
    parameters = list(model.parameters())
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
    assert float(clip_gradients(parameters, limit)) == pytest.approx(expected, rel=1e-9)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
    assert after == pytest.approx(min(expected, limit or expected), rel=1e-4)


def test_document_bounds_and_mask_say_the_same() -> None:
    batch, _ = batch_of([[3, 1, 4], [8], [1, 7]])
    bounds = document_bounds(batch.doc_ids).tolist()
    assert bounds == [0, 3, 4, 8, 16, 17, 24]
    segments = find_segments(batch.doc_ids, CPU, torch.float32)
    flat = torch.zeros(24, 24, dtype=torch.bool)
    for start, end in itertools.pairwise(bounds):
        flat[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    for row in range(3):
        part = slice(8 * row, 8 * row + 8)
        assert torch.equal(segments.mask[row, 0], flat[part, part])


def test_rows_of_one_document_need_no_mask() -> None:
    assert find_segments(torch.zeros(2, 8, dtype=torch.long), CPU, torch.float32) is None
