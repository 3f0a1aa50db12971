"""No layout changes what is computed: real ranks beside one process, at equal micro-batches.

Losses, every gradient of three AdamW steps, weights and router buffers after them, and tokens per expert; see moe_train/verify.py for
what may differ by how much, and why the optimizer's epsilon is what it is. One process starts per rank and test, not per run.
"""

import importlib
from pathlib import Path

import pytest
from layouts import FP64, Bench, Case, Content, tiny
from torch import Tensor

from moe_train import routers, verify
from moe_train.cli import merge, parse
from moe_train.data.loader import Loader
from moe_train.errors import UserError

pytestmark = pytest.mark.xdist_group("layouts")  # they share what one process computed

TOPK: Content = {"name": "topk", "z_weight": 0.01}
RECURRENT: Content = {"name": "recurrent", "router_size": 8}
FAST = {2: ["dp_shard=2", "tp=2", "ep=2", "cp=2", "pp=2"], 4: ["dp_shard=4,sharding=parameters", "dp_replicate=2,dp_shard=2"]}
SLOW = [
    "dp_shard=2",
    "dp_shard=2,sharding=none",
    "dp_shard=2,sharding=optimizer",
    "dp_shard=4,sharding=parameters",
    "dp_replicate=2,dp_shard=2",
    "tp=2",
    "tp=2,expert_tp=2",
    "pp=2",
    "pp=2,pp_schedule=gpipe",
    "pp=2,pp_schedule=interleaved",
    "pp=2,pp_schedule=zbv",
    "pp=2,pp_schedule=dualpipev",
    "ep=2",
    "ep=4",
    "cp=2",
    "cp=2,cp_method=ulysses",
    "cp=2,ep=2",
    "tp=2,ep=2",
    "pp=2,ep=2",
    "pp=2,tp=2,dp_shard=2",
    "dp_shard=2,sharding=parameters,train.recompute=full",
    "ep=2,train.recompute=selective",
    "pp=2,train.recompute=full",
]
SETTINGS: dict[str, Content] = {"topk": {"z_weight": 0.01}, "recurrent": {"router_size": 8}, "smear": {"segment_size": 5}}
VARIANTS: list[Content] = [
    {"name": "topk", "num_groups": 2, "scores": "sigmoid", "balance_scope": "sequence"},
    {"name": "topk", "balance_scope": "global_batch"},
    {"name": "recurrent", "router_size": 8, "cell": "lstm", "projector": "shared", "residual": 0.5},
    {"name": "ensemble", "segment_size": 5},
    {"name": "dselect_k", "segment_size": 5},
]
EVERY = [{"name": name, **SETTINGS.get(name, {})} for name in sorted(routers.registry())] + VARIANTS
MERGE = {name for name in routers.registry() if name in ("smear", "latent_skills", "adamix")}
REFUSED = {name: {"ep", "expert_tp"} for name in MERGE} | {"adamix": {"ep", "expert_tp", "pp", "tp", "cp"}}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


def ranks_of(layout: str) -> int:
    return verify.lay_out(parse(tiny(TOPK), "test"), layout)[1]


def axes(layout: str) -> set[str]:
    return {word.partition("=")[0] for word in layout.split(",")}


@pytest.mark.parametrize("size", FAST)
def test_one_layout_of_each_axis(size: int, bench: Bench) -> None:
    cases = [Case(layout, tiny(router)) for router in (TOPK, RECURRENT) for layout in FAST[size]]
    assert {ranks_of(layout) for layout in FAST[size]} == {size}
    assert bench.wrong(size, cases) == {}


def test_rows_pack_several_documents(bench: Bench) -> None:
    """Otherwise nothing here would see what crosses a document's edge."""
    loader = Loader(bench.prefix, seq_len=64, micro_batch_size=2, global_batch_size=8, seed=0)
    packed = [int(micro.doc_ids.max()) for micro in loader.next_step().microbatches]
    assert max(packed) >= 2
    assert sum(n > 0 for n in packed) >= 3


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    """What a router cannot work under is said before anything starts; SLOW runs each router under everything else."""
    config = parse(tiny({"name": name}), "test")
    for layout in SLOW:
        refused = REFUSED[name] & axes(layout)
        if not refused:
            verify.lay_out(config, layout)
            continue
        with pytest.raises(UserError) as error:
            verify.lay_out(config, layout)
        for axis in refused:
            assert f"parallel.{axis}=" in str(error.value)
            assert f"router {name} " in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", SLOW)
def test_every_router(layout: str, bench: Bench) -> None:
    """fp32 for all of them, and fp64, which leaves no room for a small mistake, for the two with the most machinery."""
    runs = [tiny(router) for router in EVERY if not REFUSED.get(router["name"], set()) & axes(layout)]
    runs += [tiny(router, FP64) for router in (TOPK, RECURRENT)]
    assert bench.wrong(ranks_of(layout), [Case(layout, run) for run in runs]) == {}
