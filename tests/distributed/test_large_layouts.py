"""The flagship under layouts of up to 1,024 ranks: what each rank would hold, on a fake process group with meta tensors.

The expected shapes are worked out here, from the layout's numbers alone.
"""

import math
import multiprocessing
import runpy
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from corpora import write_corpus
from ranks import run_ranks

from moe_train.cli import load_run

CONFIGS = Path(__file__).parents[2] / "configs"
FLAGSHIP = CONFIGS / "rmoe_1b_8xa100.yaml"
D, E, F, V, P, LAYERS = 1280, 16, 448, 96512, 128, 24  # hidden, experts, width of one, vocabulary, router, layers
ROUTERS = 4_080_384
TOTAL = 1_069_103_104  # 2 V D + 24 (4 D^2 + 3 E F D + 2 D) + D + ROUTERS

Shape = tuple[int, ...]


class Axes(NamedTuple):
    """Ranks along each axis; the sizes of a layout."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    expert_tp: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.replicate * self.shard * self.cp * self.tp

    @property
    def expert_shard(self) -> int:
        return self.shard * self.cp * self.tp // (self.ep * self.expert_tp)

    def words(self) -> list[str]:
        names = {"pp": self.pp, "dp_replicate": self.replicate, "dp_shard": self.shard, "cp": self.cp, "tp": self.tp}
        names |= {"ep": self.ep, "expert_tp": self.expert_tp}
        return [f"parallel.{name}={size}" for name, size in names.items()]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank is on every axis: tp fastest, then cp, shard, replicate, pp; experts see the inner three otherwise."""
        inner = rank % (self.shard * self.cp * self.tp)
        found = {"tp": rank % self.tp, "cp": rank // self.tp % self.cp, "shard": inner // self.tp}
        found["replicate"] = rank // (self.shard * self.cp * self.tp) % self.replicate
        found["pp"] = rank // (self.replicate * self.shard * self.cp * self.tp)
        group, found["expert_tp"] = divmod(inner, self.tp) if self.expert_tp > 1 else (inner // self.tp, 0)
        found["ep"] = group % self.ep
        outer = group // self.ep
        found["expert_shard"] = outer if self.expert_tp > 1 else outer * self.tp + found["tp"]
        return found


def part(size: int, ranks: int, index: int) -> int:
    """Rows of `size` that rank `index` of `ranks` holds: as many as ceil allows, the last ones fewer or none."""
    most = -(-size // ranks)
    return max(min(most, size - index * most), 0)


def expected(axes: Axes, rank: int, layers: list[range]) -> dict[str, Shape]:
    """Every parameter that a rank holds and the shape of its part; `layers` of each of its stages."""
    at = axes.coordinates(rank)
    shards, mine, tp = axes.shard * axes.cp, at["shard"], axes.tp

    def rows(*shape: int) -> Shape:
        return (part(shape[0], shards, mine), *shape[1:])

    found: dict[str, Shape] = {f"shared_router.{kind}": rows(3 * P, P) for kind in ("weight_ih", "weight_hh")}
    found |= {f"shared_router.{kind}": rows(3 * P) for kind in ("bias_ih", "bias_hh")}
    for layer in (layer for stage in layers for layer in stage):
        block = {"attention_norm.weight": rows(D), "mlp_norm.weight": rows(D), "attention.out.weight": rows(D, D // tp)}
        block |= {f"attention.{name}.weight": rows(D // tp, D) for name in "qkv"}
        block |= {"mlp.router.projector": rows(P, D), "mlp.router.scorer": rows(E, P)}
        for name, shape in (("gate_up", [E, 2, F, D]), ("down", [E, D, F])):
            shape[0], shape[2] = shape[0] // axes.ep, shape[2] // axes.expert_tp
            dim = next(i for i, size in enumerate(shape) if size % axes.expert_shard == 0)
            shape[dim] //= axes.expert_shard
            block[f"mlp.experts.{name}"] = tuple(shape)
        found |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    if 0 in layers[0]:
        found["embedding.weight"] = rows(V // tp, D)
    if LAYERS - 1 in layers[-1]:
        found |= {"head.weight": rows(V // tp, D), "norm.weight": rows(D)}
    return found


def describe(path: str, words: list[str], world_size: int, rank: int) -> dict[str, Any]:
    """What `rank` of `world_size` holds of a run. Only a fresh process may call this: the process group is a fake."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moe_train.engine.model import Model
    from moe_train.parallel.mesh import World

    config = load_run(path, words)
    conflicts = config.layout_conflicts(world_size)
    assert not conflicts, conflicts
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        model = Model(config, World(rank, world_size, torch.device("cpu"), torch.bfloat16, "a rank that is not there"))
        parameters = dict(model.named_parameters())
        local = {name: p.to_local() for name, p in parameters.items()}
        axes = ("pp", "replicate", "shard", "tp", "cp", "ep", "expert_tp")
        return {
            "whole": {name: tuple(p.shape) for name, p in parameters.items()},
            "local": {name: tuple(p.shape) for name, p in local.items()},
            "split": {name: [str(x).split("(")[0] for x in p.placements] for name, p in parameters.items()},
            "bytes": sum(
                p.to_local().nbytes for _, p in model.named_parameters()
            ),  # each stage here has its own copy of a cell
            "meta": all(p.is_meta for p in local.values()),
            "layers": [len(p.layers) for p in model.parts],
            "peers": {axis: dist.get_process_group_ranks(model.layout.group(axis)) for axis in axes},
        }
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        yield pool


SHIPPED = {
    "dp8": (Axes(shard=8), FLAGSHIP, [[24]]),
    "ep8": (Axes(shard=8, ep=8), CONFIGS / "rmoe_1b_8xa100_ep8.yaml", [[24]]),
    "tp2_ep4": (Axes(shard=4, tp=2, ep=4), CONFIGS / "rmoe_1b_8xa100_tp2_ep4.yaml", [[24]]),
    "pp2_dp4": (Axes(pp=2, shard=4), CONFIGS / "rmoe_1b_8xa100_pp2_dp4.yaml", [[15], [9]]),
}
LARGE = {
    # interleaved: pipeline rank 0 holds stages 0 and 2, rank 1 holds 1 and 3
    "64": (Axes(pp=2, replicate=2, shard=4, tp=4, ep=4, expert_tp=4), [8, 8, 6, 2], "interleaved"),
    "1024": (Axes(pp=2, shard=128, cp=2, tp=2, ep=16), [15, 9], "1f1b"),
    "1024-flat": (Axes(shard=256, tp=4, ep=4), None, "1f1b"),
}


def ranges(counts: list[int]) -> list[range]:
    """Layers of each stage."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def check(seen: dict[str, Any], axes: Axes, rank: int, layers: list[range]) -> None:
    wanted = expected(axes, rank, layers)
    assert seen["local"] == wanted
    cells = sum(math.prod(shape) for name, shape in wanted.items() if name.startswith("shared_router"))
    masters = sum(math.prod(shape) for shape in wanted.values()) + (len(layers) - 1) * cells
    assert seen["bytes"] == 4 * masters  # fp32
    assert seen["meta"]
    at = axes.coordinates(rank)
    for axis, peers in seen["peers"].items():
        size = axes.shard * axes.cp if axis == "shard" else getattr(axes, axis)
        assert len(peers) == size, axis
        assert peers.index(rank) == at[axis], axis
    for name, split in seen["split"].items():
        cut = seen["whole"][name] != seen["local"][name]
        assert cut == (math.prod(seen["whole"][name]) != math.prod(wanted[name]))
        if axes.replicate > 1:
            assert split[0] in ("R", "Replicate"), name


@pytest.mark.parametrize(("layout", "rank"), [("dp8", 5), ("ep8", 5), ("tp2_ep4", 5), ("pp2_dp4", 0), ("pp2_dp4", 7)])
def test_the_flagship_on_eight_ranks(layout: str, rank: int, process: ProcessPoolExecutor) -> None:
    axes, path, stages = SHIPPED[layout]
    seen = process.submit(describe, str(path), [], axes.world, rank).result()
    counts = [count for stage in stages for count in stage]
    stage = axes.coordinates(rank)["pp"]
    assert seen["layers"] == stages[stage]
    check(seen, axes, rank, [ranges(counts)[stage]])
    if axes.pp == 1:  # all parameters are here, in part
        assert sum(math.prod(shape) for shape in seen["whole"].values()) == TOTAL
        routers = {name: math.prod(shape) for name, shape in seen["whole"].items() if "router" in name}
        assert sum(routers.values()) == ROUTERS
        copies = sum(math.prod(shape) for name, shape in seen["local"].items() if not _is_split(name))
        assert sum(math.prod(shape) for shape in seen["local"].values()) * 8 == TOTAL + (axes.tp - 1) * 8 // axes.tp * copies


@pytest.mark.parametrize(("layout", "rank"), [("64", 0), ("64", 63), ("1024", 0), ("1024", 1023), ("1024-flat", 517)])
def test_the_flagship_on_many_ranks(layout: str, rank: int, process: ProcessPoolExecutor) -> None:
    """Sizes that divide evenly and sizes that do not: 16 scorer rows over 256 ranks leave most with none."""
    axes, counts, schedule = LARGE[layout]
    words = [*axes.words(), f"parallel.pp_schedule={schedule}", "train.micro_batch_size=1", "train.global_batch_size=1024"]
    words += [f"parallel.pp_layers={counts}"] if counts else []
    seen = process.submit(describe, str(FLAGSHIP), words, axes.world, rank).result()
    mine = ranges(counts or [LAYERS])[axes.coordinates(rank)["pp"] :: axes.pp]
    check(seen, axes, rank, mine)


def test_the_expected_parts_add_up() -> None:
    """The closed form itself: the parts of all ranks are `replicate` whole models, with a shared cell for each stage."""
    for axes, counts, _ in (LARGE["64"], LARGE["1024"]):
        held = [expected(axes, rank, ranges(counts)[axes.coordinates(rank)["pp"] :: axes.pp]) for rank in range(axes.world)]
        total = sum(math.prod(shape) for parts in held for name, shape in parts.items() if _is_split(name))
        copies = sum(math.prod(shape) for parts in held for name, shape in parts.items() if not _is_split(name))
        cell = sum(math.prod(shape) for shape in [(3 * P, P)] * 2 + [(3 * P,)] * 2)
        whole_split = 2 * V * D + LAYERS * (4 * D * D + 3 * E * F * D)
        assert total == axes.replicate * whole_split
        rest = TOTAL - whole_split - cell + axes.pp * cell  # one entry for the cells of a rank
        assert copies == axes.replicate * axes.tp * rest


def _is_split(name: str) -> bool:
    """Whether tensor-parallel ranks hold different parts of a parameter (experts: or data-parallel shards of it)."""
    return any(word in name for word in ("attention.", "experts", "embedding", "head"))


def test_the_flagship_is_the_papers() -> None:
    """arXiv 2408.06793, section 4.2 and appendix."""
    config = load_run(FLAGSHIP)
    model, optim, train, router = config.model, config.optim, config.train, config.model.router
    assert (model.num_layers, model.hidden_size, model.num_heads, model.head_size, model.kv_heads) == (24, 1280, 20, 64, 20)
    assert (model.num_experts, model.ffn_hidden_size, model.shared_expert_size, model.vocab_size) == (16, 448, 0, 96512)
    assert (model.init_std, model.tie_embeddings, model.capacity_factor, model.has_dense_layers) == (0.02, False, None, False)
    assert (router.name, router.top_k, router.cell, router.passing, router.balance_weight) == (
        "recurrent",
        4,
        "gru",
        "full",
        0.01,
    )
    assert (train.seq_len, train.global_batch_size, train.steps) == (4096, 1120, 10000)
    assert (optim.lr, optim.min_lr, optim.warmup_steps) == (4.2e-4, 4.2e-5, 2000)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize("name", ["dp8", "ep8", "tp2_ep4", "pp2_dp4"])
def test_fragments_hold_a_layout_and_nothing_else(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: [{FLAGSHIP}, {CONFIGS}/parallel/{name}.yaml]\n")
    config, flagship = load_run(run), load_run(FLAGSHIP)
    assert config.model_copy(update={"parallel": flagship.parallel}) == flagship
    assert not config.layout_conflicts(8)
    assert config.layout_conflicts(16)
    shipped = load_run(SHIPPED[name][1])
    assert shipped.parallel == config.parallel or name == "dp8"  # which the flagship has without a number of ranks
    assert shipped.model == config.model
    assert not shipped.layout_conflicts(8)


def test_the_documented_costs_are_those_of_these_layouts() -> None:
    """The table of docs/parallelism.md is what its script prints, and the script's parameters are the ranks' parts above."""
    docs = CONFIGS.parent / "docs"
    script = runpy.run_path(str(docs / "figures" / "flagship_layouts.py"))
    assert script["table"]() in (docs / "parallelism.md").read_text()
    masters = {cost.name: cost.masters for cost in script["layouts"]()}
    for name, documented in (("dp8", "dp8, `optimizer`"), ("ep8", "ep8"), ("tp2_ep4", "tp2 ep4"), ("pp2_dp4", "pp2 dp4")):
        axes, _, stages = SHIPPED[name]
        held = expected(axes, 0, [range(stages[0][0])])
        assert masters[documented] == sum(math.prod(shape) for shape in held.values()), name


SMALL = ["num_layers=4", "hidden_size=64", "vocab_size=512", "ffn_hidden_size=32"]


def train_small(paths: list[str], prefix: str) -> list[list[float]]:
    """Losses of three steps of each run, shrunk."""
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world
    from moe_train.pretraining import data_loader, settle_vocabulary

    words = [*(f"model.{word}" for word in SMALL), "train.global_batch_size=16", "train.micro_batch_size=1", "train.steps=3"]
    words += ["train.seq_len=64", "train.device=cpu", f"data.train={prefix}", "optim.warmup_steps=0"]
    losses = []
    for path in paths:
        config, tokenizer = settle_vocabulary(load_run(path, words))
        world = start_world(config)
        engine, loader = NativeEngine(config, world), data_loader(config, world, tokenizer)
        losses.append([])
        for _ in range(config.train.steps):
            losses[-1].append(engine.forward_backward(loader.next_step()).loss)
            engine.step()
    return losses


@pytest.mark.slow
def test_the_flagship_shrunk_trains_on_eight_ranks(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "text", documents=200)
    paths = [str(path) for _, path, _ in SHIPPED.values()]
    for losses in run_ranks(8, train_small, paths, prefix):
        for seen in losses:
            assert len(seen) == 3
            assert seen == pytest.approx(losses[0], rel=1e-5)
            assert seen[2] < seen[0]
