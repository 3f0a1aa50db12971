"""Ranks whose attention takes runs of queries, as the kernels of a GPU do, beside one process that takes a mask."""

import pytest
from flash import RUNS
from layouts import FP64, Bench, Case, tiny

from moe_train.engine import native
from moe_train.parallel import apply

RECURRENT = {"name": "recurrent", "router_size": 8}


def take_runs() -> None:
    """On a rank: the kernel that is chosen there."""
    native.choose_attention = apply.choose_attention = lambda *_: RUNS


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_layout_of_positions(size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    layouts = {2: ["cp=2", "cp=2,cp_method=ulysses", "tp=2"], 4: ["cp=4", "cp=2,tp=2", "cp=2,pp=2"]}[size]
    run = tiny(RECURRENT, FP64, {"model": {"num_kv_heads": 4}})
    bench = Bench(tmp_path_factory.mktemp("runs"))
    assert not bench.wrong(size, [Case(layout, run) for layout in layouts], bug=take_runs)
