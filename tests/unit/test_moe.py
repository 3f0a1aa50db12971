"""The order in which a layer of experts does its work."""

from typing import Any

import pytest
import torch
from models import TOPK, batch_of, config_of, decoder_of
from torch import Tensor

from moe_train.model.moe import LocalDispatcher
from moe_train.parallel.recompute import apply_recompute


class Recording(LocalDispatcher):
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def plan(self, expert_ids: Tensor) -> None:
        self.seen.append("plan")

    def dispatch(self, rows: Tensor, expert_ids: Tensor, weights: Tensor, plan: None) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.append("dispatch")
        return rows, expert_ids, weights


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_shared_expert_is_under_way_before_a_rank_waits_for_row_counts(mode: Any) -> None:
    """And what is recomputed makes no plan: ranks would exchange row counts again, in another order."""
    config = config_of(TOPK, num_layers=1, shared_expert_size=8).model
    batch, targets = batch_of([[6, 6], [12]])
    plain = decoder_of(config)
    plain(batch, targets).loss.backward()

    model, seen = decoder_of(config), []
    apply_recompute(model, mode)
    moe = model.layers["0"].mlp
    moe.dispatcher = Recording(seen)
    moe.shared_expert.register_forward_pre_hook(lambda *_: seen.append("shared"))
    moe.run_both = lambda routed, shared: (shared(), routed())[::-1]
    model(batch, targets).loss.backward()

    assert seen[:3] == ["shared", "plan", "dispatch"]
    assert seen.count("plan") == 1
    assert sorted(seen[3:]) == ([] if mode == "none" else ["dispatch", "shared"])
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=name)
