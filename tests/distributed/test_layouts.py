"""No layout changes what is computed: real ranks beside one process, at equal micro-batches.

Losses, every gradient of three AdamW steps, weights and router buffers after them, and tokens per expert; see moe_train/verify.py for
what may differ by how much, and why the optimizer's epsilon is what it is.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import FP64, Bench, Case, Content, tiny
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train import routers, verify
from moe_train.cli import parse
from moe_train.data.loader import Loader
from moe_train.errors import UserError

TOPK: Content = {"name": "topk", "z_weight": 0.01}
RECURRENT: Content = {"name": "recurrent", "router_size": 8}
FAST = {
    2: ["dp_shard=2", "tp=2", "ep=2", "cp=2", "pp=2"],
    4: ["dp_shard=4,sharding=parameters", "dp_replicate=2,dp_shard=2,train.recompute=full"],
}
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
ZERO_BUBBLE = ["pp=2,pp_schedule=zbv", "pp=2,pp_schedule=dualpipev"]  # four stages, of two layers each
SETTINGS: dict[str, Content] = {"topk": {"z_weight": 0.01}, "recurrent": {"router_size": 8}, "smear": {"segment_size": 5}}
# The gradient of VQMoE's mixing bias is a sum that nearly cancels: fp32 rounding alone can move it by 1e-5 (fp64: by 1e-14).
EXACT: dict[str, Content] = {"vqmoe": {"train": {"dtype": "fp64"}, "kernels": {"backend": "torch"}}}
VARIANTS: list[Content] = [
    {"name": "topk", "num_groups": 2, "scores": "sigmoid", "balance_scope": "sequence"},
    {"name": "topk", "balance_scope": "global_batch"},
    {"name": "recurrent", "router_size": 8, "cell": "lstm", "projector": "shared", "residual": 0.5},
    {"name": "ensemble", "segment_size": 5},
    {"name": "dselect_k", "segment_size": 5},
    {"name": "acmoe", "mix_weights": True, "dispersion": "pairwise"},
    {"name": "vqmoe", "codebook": "ema", "top_k": 2},
]
EVERY = [{"name": name, **SETTINGS.get(name, {})} for name in sorted(routers.registry())] + VARIANTS
REFUSED = {  # router -> axes that it cannot work under
    "smear": {"ep", "expert_tp"},
    "latent_skills": {"ep", "expert_tp"},
    "adamix": {"ep", "expert_tp", "pp", "tp", "cp"},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("layouts"))


def ranks_of(layout: str) -> int:
    return verify.lay_out(parse(tiny(TOPK), "test"), layout).ranks


def axes(layout: str) -> set[str]:
    return {word.partition("=")[0] for word in layout.split(",")}


@pytest.mark.parametrize("size", FAST)
def test_one_layout_of_each_axis(size: int, bench: Bench) -> None:
    cases = [Case(layout, tiny(router)) for router in (TOPK, RECURRENT) for layout in FAST[size]]
    assert {ranks_of(layout) for layout in FAST[size]} == {size}
    assert bench.wrong(size, cases) == {}


def test_a_stage_that_uses_a_parameter_twice(bench: Bench) -> None:
    """The shared cell in both layers of a stage, whose gradients a zero-bubble schedule would compute in two passes."""
    deep = {"model": {"num_layers": 8}}
    assert bench.wrong(2, [Case(ZERO_BUBBLE[0], tiny(RECURRENT, deep))]) == {}


def test_rows_pack_several_documents(bench: Bench) -> None:
    """Otherwise nothing here would see what crosses a document's edge."""
    loader = Loader(bench.prefix, seq_len=64, micro_batch_size=2, global_batch_size=8, seed=0)
    steps = [loader.next_step() for _ in range(verify.STEPS)]
    documents = torch.cat([1 + micro.doc_ids.amax(1) for step in steps for micro in step.microbatches])
    assert documents.max() >= 3
    assert (documents > 1).sum() >= 8


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
    deep = {"model": {"num_layers": 8}} if layout in ZERO_BUBBLE else {}
    chosen = [router for router in EVERY if not REFUSED.get(router["name"], set()) & axes(layout)]
    runs = [tiny(router, EXACT.get(router["name"], {}), deep) for router in chosen]
    runs += [tiny(router, FP64, deep) for router in (TOPK, RECURRENT)]
    assert bench.wrong(ranks_of(layout), [Case(layout, run) for run in runs]) == {}


# What a model may have besides


EVERYTHING: Content = {
    "model": {
        "shared_expert_size": 8,
        "num_dense_layers": 1,
        "num_kv_heads": 2,
        "qk_norm": True,
        "tie_embeddings": True,
    }
}
SCOPES = ["sequence", "micro_batch", "global_batch"]
FEATURES = {
    2: ["dp_shard=2", "tp=2", "cp=2", "cp=2,cp_method=ulysses", "ep=2", "pp=2", "pp=2,pp_schedule=zbv"],
    4: ["dp_shard=4,sharding=parameters", "tp=2,ep=2", "pp=2,ep=2", "pp=2,tp=2"],
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", FEATURES)
def test_everything_a_model_may_have(size: int, bench: Bench) -> None:
    """Shared expert, a dense layer, grouped queries, norms of heads, tied embeddings: together, under every scope of balancing; rows
    of one document; and experts that are full."""
    runs = [tiny({**router, "balance_scope": scope}, EVERYTHING, FP64) for router in (TOPK, RECURRENT) for scope in SCOPES]
    runs += [tiny(TOPK, {"data": {"mask_documents": False}}, FP64)]
    limits = [{"capacity_factor": 0.75, "drop_policy": policy} for policy in ("position", "score")]
    runs += [tiny(router, {"model": limit}, FP64) for router in (TOPK, RECURRENT) for limit in limits]
    assert bench.wrong(size, [Case(layout, run) for layout in FEATURES[size] for run in runs]) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", ["dp_shard=2", "tp=2", "ep=2", "pp=2", "cp=2", "cp=2,cp_method=ulysses"])
def test_compiled_blocks(layout: str, bench: Bench) -> None:
    """Blocks that torch.compile made, beside one process that did not."""
    cases = [Case(f"{layout},train.compile=true", tiny(router, {"model": {"num_layers": 2}})) for router in (TOPK, RECURRENT)]
    assert bench.wrong(2, cases) == {}


# Where tokens go


SKEWED = [
    {"experts": [2], "top_k": 1, "renormalize": False},  # all to one
    {"experts": [0, 1, 3]},  # an expert with none
    {"experts": [2, 3]},  # a rank of two with none
    {
        "experts": [0],
        "top_k": 1,
        "renormalize": False,
        "silent": True,
    },  # a rank that sends none, and three of four that get none
]
SKEWED_LAYOUTS = {2: ["ep=2", "cp=2,ep=2"], 4: ["ep=4", "tp=2,ep=2", "tp=2,ep=2,expert_tp=2", "pp=2,ep=2"]}


def skew() -> None:
    importlib.import_module("skewed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SKEWED_LAYOUTS)
def test_skewed_routing(size: int, bench: Bench) -> None:
    one_row = {"train": {"micro_batch_size": 1}}  # so that the rows of a silent rank are all silent
    runs = [tiny({"name": "skewed", **router}, one_row, FP64) for router in SKEWED]
    assert bench.wrong(size, [Case(layout, run) for layout in SKEWED_LAYOUTS[size] for run in runs], prepare=skew) == {}


# Planted bugs: each must be found, and where it is


def patch(owner: Any, name: str, changed: Callable[..., Any]) -> None:
    """Let `changed(original, ...)` run instead of a function, in this process."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args: changed(original, *args))


def double_a_gradient() -> None:
    from moe_train.engine.native import NativeEngine

    def doubled(original: Any, engine: Any, *args: Any) -> Any:
        result = original(engine, *args)
        gradient = dict(engine.model.named_parameters())["layers.1.mlp.experts.down"].grad
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0].mul_(2)
        return result

    patch(NativeEngine, "forward_backward", doubled)


def forget_the_sum_over_stages() -> None:
    from moe_train.parallel.pipeline import SharedParameters

    patch(SharedParameters, "sum", lambda original, shared: None)


def rotate_returning_rows() -> None:
    from moe_train.parallel.expert import ExpertParallel

    patch(ExpertParallel, "combine", lambda original, self, rows, plan: original(self, rows.roll(1, 0), plan))


def average_the_balance_loss() -> None:
    from moe_train.routers import topk

    def averaged(original: Any, *args: Any) -> Tensor:
        return original(*args) / dist.get_world_size()

    patch(topk, "balance_loss", averaged)


@pytest.mark.parametrize(
    ("bug", "layout", "seen"),
    [
        (double_a_gradient, "ep=2", "gradients/1/layers.1.mlp.experts.down"),
        (forget_the_sum_over_stages, "pp=2", "gradients/1/shared_router.weight_ih"),
        (rotate_returning_rows, "ep=2", "loss/1/cross entropy"),
        (average_the_balance_loss, "dp_shard=2", "loss/1/training"),
    ],
)
def test_a_planted_bug_is_found(bug: Callable[[], None], layout: str, seen: str, bench: Bench) -> None:
    case = Case(layout, tiny(RECURRENT))
    wrong = bench.wrong(2, [case], bug=bug)
    assert any(failure.startswith(f"{seen}: ") for failure in wrong[str(case)]), wrong


def test_differences_of_no_number_and_of_nothing() -> None:
    """The comparison itself must not let anything through."""
    one = torch.ones(3)
    assert verify.difference(one, one, 0.0) == 0.0
    assert verify.difference(one * 1.5, one, 0.0) == pytest.approx(0.5)
    assert verify.difference(one * float("nan"), one, 1e9) == float("inf")
    assert verify.difference(one[:2], one, 1e9) == float("inf")
    assert verify.difference(one, one * 0, 1.0) == float("inf")
    assert verify.difference(one * 1e-9, one * 1e-8, 1e-7) == 0.0
    assert verify.miscounted(one * float("nan"), one) == float("inf")
    assert verify.miscounted(torch.tensor([3.0, 5.0]), torch.tensor([4.0, 4.0])) == 1.0
