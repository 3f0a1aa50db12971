"""What a step sends, counted on real ranks, is what docs/parallelism.md says: every axis, every call, every byte."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
from corpora import write_corpus
from layouts import tiny
from ranks import run_ranks

from moe_train.cli import parse

D, LAYERS, HEADS, HEAD, E, F, V, P, K = 16, 4, 4, 4, 4, 8, 320, 8, 2  # of the tiny run; P: router size, K: experts of a token
ROWS, LENGTH, BATCH, W = 2, 64, 8, 4  # rows of a micro-batch, tokens of a row, rows of a step, bytes of a number (fp32)
ATTENTION, EXPERTS, NORMS = 4 * D * D, 3 * E * F * D, 2 * D  # parameters of a layer
CELL, ROUTER = 6 * P * P + 6 * P, P * D + E * P  # of the shared cell and of a layer's router
ENDS = 2 * V * D + D  # embedding, head, final norm

Counts = Counter[tuple[str, str]]
Seen = dict[tuple[str, str], tuple[int, int]]


def measure(run: dict[str, Any]) -> tuple[Seen, int]:
    """What this rank sends in its second step, and to how many ranks of `ep` its tokens went in it, tokens taken one by one."""
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world
    from moe_train.parallel.traffic import Traffic
    from moe_train.pretraining import data_loader, settle_vocabulary

    config, tokenizer = settle_vocabulary(parse(run, "test"))
    world = start_world(config)
    engine, loader = NativeEngine(config, world), data_loader(config, world, tokenizer)
    engine.forward_backward(loader.next_step())
    engine.step()
    away = []

    def count(router: Any, inputs: Any, routing: Any) -> None:
        own = engine.model.layout.at("ep")
        for ids in routing.expert_ids.tolist():
            away.append(len({i // (E // config.parallel.ep) for i in ids} - {own}))

    for router in engine.model.routers().values():
        router.register_forward_hook(count)
    with Traffic(engine.model.layout) as traffic:
        engine.forward_backward(loader.next_step())
        engine.step()
    return {key: tuple(sent) for key, sent in traffic.sent().items()}, sum(away)


class Layout(NamedTuple):
    """Sizes of the axes, on which everything below depends."""

    ranks: int
    replicate: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    expert_tp: int = 1
    sharding: str = "gradients"
    cp_method: str = "gather"

    @property
    def run(self) -> dict[str, Any]:
        keys = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep, "expert_tp": self.expert_tp}
        return {**keys, "dp_replicate": self.replicate, "sharding": self.sharding, "cp_method": self.cp_method} | (
            {"pp_layers": [LAYERS // self.pp] * self.pp} if self.pp > 1 else {}
        )

    @property
    def data(self) -> int:
        """Ranks with rows of their own."""
        return self.ranks // (self.tp * self.cp * self.pp)

    @property
    def micro_batches(self) -> int:
        return BATCH // (ROWS * self.data)

    @property
    def local(self) -> int:
        """Tokens of a micro-batch whose hidden rows this rank holds between attention and MLP."""
        return ROWS * LENGTH // (self.tp * self.cp)


class Expected:
    """Closed forms, added up: calls and bytes by (axis, operation)."""

    def __init__(self) -> None:
        self.calls: Counts = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def add(self, axis: str, operation: str, calls: float, size: float) -> None:
        """`calls` of `size` bytes each."""
        if calls:
            self.calls[axis, operation] += int(calls)
            self.bytes[axis, operation] += int(calls * size)

    def seen(self) -> Seen:
        return {key: (calls, self.bytes[key]) for key, calls in self.calls.items()}


def data_parallel(layout: Layout, found: Expected, experts: str = "", norm: bool = True) -> None:
    """FSDP: parameters are gathered and gradients reduce-scattered, in units: the routers, each block, the rest; experts where they
    have a mesh of their own (`experts`: its axis). `norm`: whether the final norm is here."""
    n = layout.ranks // (layout.pp * layout.replicate * layout.tp)
    if layout.sharding == "none":
        n = 1
    m = layout.replicate if layout.sharding != "none" else layout.data * layout.cp
    tp, layers = layout.tp, LAYERS // layout.pp
    block = ATTENTION // tp + NORMS + (0 if experts else EXPERTS // layout.expert_tp)
    units = [*[block] * layers, layers * ROUTER + CELL, (ENDS - D) // tp // layout.pp + D * norm]
    reduced = layout.micro_batches if layout.sharding in ("gradients", "parameters") and layout.pp == 1 else 1
    again = layout.micro_batches if layout.sharding == "parameters" else 1
    for i, size in enumerate(units):
        gathers = again * (2 if layout.sharding == "parameters" and i < layers else 1)
        if n > 1:
            found.add("shard", "all_gather", gathers, size / n * (n - 1) * W)
            found.add("shard", "reduce_scatter", reduced, size / n * (n - 1) * 4)
        if m > 1:
            found.add("replicate", "all_reduce", reduced, 2 * (m - 1) / m * size / n * 4)
    if experts:
        size = EXPERTS // (layout.ep * layout.expert_tp)
        n = layout.ranks // (layout.pp * layout.ep * layout.expert_tp)
        if n > 1:
            found.add(experts, "all_gather", layers, size / n * (n - 1) * W)
            found.add(experts, "reduce_scatter", layers * reduced, size / n * (n - 1) * 4)


def tensor_parallel(layout: Layout, found: Expected) -> None:
    """Attention gathers and scatters rows, the vocabulary is split, and parameters that are whole everywhere have their gradients
    added up."""
    t, micro = layout.tp, layout.micro_batches
    rows = (t - 1) * layout.local * D * W
    for operation in ("all_gather", "reduce_scatter"):
        found.add("tp", operation, micro * (2 * LAYERS + 2), rows)
    for floats in (1, 3):  # of each token: the largest logit; the sum of exponentials, the target's logit, whether it is here
        found.add("tp", "all_reduce", micro, 2 * (t - 1) / t * ROWS * LENGTH * 4 * floats)
    for count, size in ((2 * LAYERS + 1, D), (LAYERS, P * D), (LAYERS, E * P), (2, 3 * P * P), (2, 3 * P)):
        found.add("tp", "all_reduce", micro * count, 2 * (t - 1) / t * size * 4)


def shared_rows(layout: Layout, found: Expected, axis: str) -> None:
    """The balance loss counts choices over all ranks of tp and cp."""
    n = layout.tp * layout.cp
    found.add(axis, "all_reduce", layout.micro_batches * LAYERS, 2 * (n - 1) / n * ROWS * E * 4)


def width_parallel(layout: Layout, found: Expected) -> None:
    """Experts' width split over tp: rows with ids and weights are gathered, results scattered."""
    calls, t = layout.micro_batches * LAYERS, layout.expert_tp
    tokens = (t - 1) * layout.local
    for size in (4 * K, D * W, 4 * K, D * W):  # ids, rows, weights; gradients of the results
        found.add("expert_tp", "all_gather", calls, tokens * size)
    for size in (D * W, D * W, 4 * K):  # results; gradients of rows and of weights
        found.add("expert_tp", "reduce_scatter", calls, tokens * size)


def context_parallel(layout: Layout, found: Expected) -> None:
    c, calls = layout.cp, layout.micro_batches * LAYERS
    tokens = ROWS * LENGTH // c
    if layout.cp_method == "gather":  # keys and values in forward, their gradients in backward
        for operation in ("all_gather", "reduce_scatter"):
            found.add("cp", operation, calls, (c - 1) * tokens * 2 * HEADS * HEAD * W)
    else:  # queries, keys, values, results; forward and backward
        found.add("cp", "all_to_all", 8 * calls, (c - 1) / c * tokens * HEADS * HEAD * W)


def expert_parallel(layout: Layout, found: Expected, sent: int, received: int) -> None:
    """`sent` and `received`: rows to and from other ranks in a step's forward passes. Rows, weights and ids go out and results come
    back; the gradients go the other way."""
    calls = layout.micro_batches * LAYERS
    found.add("ep", "all_to_all", 8 * calls, 0)
    found.bytes["ep", "all_to_all"] += calls * (layout.ep - 1) * 4  # how many rows: one int32 to each rank
    found.bytes["ep", "all_to_all"] += (sent + received) * (2 * D * W + 4 * K) + sent * 4 * K


def pipeline(layout: Layout, found: Expected) -> None:
    """Hidden rows, router state and loss to the next stage, or their gradients to the one before; the cell that stages share."""
    for size in (layout.local * D * W, layout.local * P * 4, 4):
        found.add("pp", "send", layout.micro_batches, size)
    found.add("pp", "all_reduce", 1, 2 * (layout.pp - 1) / layout.pp * CELL * 4 * layout.pp / layout.ranks)


def everyone(layout: Layout, found: Expected, axis: str = "world") -> None:
    """Losses and statistics (loads, entropy, balance loss of each layer) in float64, and the gradient norm."""
    n = layout.ranks
    for size in (2 + LAYERS * (E + 2), 1):
        found.add(axis, "all_reduce", 1, 2 * (n - 1) / n * size * 8)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text", documents=100)


def run(layout: Layout, prefix: str) -> list[tuple[Seen, int]]:
    content = tiny({"name": "recurrent", "router_size": P}, {"parallel": layout.run, "data": {"train": prefix}})
    return run_ranks(layout.ranks, measure, content)


SLOW = pytest.mark.slow  # as the others, under another key


@pytest.mark.parametrize(
    "sharding", ["gradients", pytest.param("optimizer", marks=SLOW), pytest.param("parameters", marks=SLOW)]
)
def test_data_parallel(sharding: str, prefix: str) -> None:
    layout, found = Layout(4, replicate=2, sharding=sharding), Expected()
    data_parallel(layout, found)
    everyone(layout, found)
    for seen, _ in run(layout, prefix):
        assert seen == found.seen()


@SLOW
def test_whole_copies(prefix: str) -> None:
    layout, found = Layout(2, sharding="none"), Expected()
    data_parallel(layout, found)
    everyone(layout, found, "replicate")
    for seen, _ in run(layout, prefix):
        assert seen == found.seen()


def test_tensor_parallel(prefix: str) -> None:
    """Its ranks are data-parallel to the experts, whose parameters all four ranks share out."""
    layout, found = Layout(4, tp=2), Expected()
    data_parallel(layout, found, experts="expert_shard")
    tensor_parallel(layout, found)
    shared_rows(layout, found, "sharers")
    everyone(layout, found, "expert_shard")
    for seen, _ in run(layout, prefix):
        assert seen == found.seen()


@SLOW
def test_tensor_parallel_inside_experts(prefix: str) -> None:
    layout, found = Layout(4, tp=2, expert_tp=2), Expected()
    data_parallel(layout, found)
    tensor_parallel(layout, found)
    width_parallel(layout, found)
    shared_rows(layout, found, "sharers")
    everyone(layout, found)
    for seen, _ in run(layout, prefix):
        assert seen == found.seen()


@pytest.mark.parametrize("method", ["gather", pytest.param("ulysses", marks=SLOW)])
def test_context_parallel(method: str, prefix: str) -> None:
    layout, found = Layout(4, cp=2, cp_method=method), Expected()
    data_parallel(layout, found)
    context_parallel(layout, found)
    shared_rows(layout, found, "sharers")
    everyone(layout, found, "shard")
    for seen, _ in run(layout, prefix):
        assert seen == found.seen()


def test_expert_parallel(prefix: str) -> None:
    """Each rank's bytes are those of its own tokens, and of its peers' tokens that came to it."""
    layout = Layout(4, ep=2)
    ranks = run(layout, prefix)
    for rank, (seen, sent) in enumerate(ranks):
        found = Expected()
        data_parallel(layout, found, experts="expert_shard")
        expert_parallel(layout, found, sent, received=ranks[rank ^ 1][1])
        everyone(layout, found, "shard")
        assert seen == found.seen(), rank
    assert len({sent for _, sent in ranks}) > 1


def test_pipeline(prefix: str) -> None:
    layout = Layout(4, pp=2)
    for rank, (seen, _) in enumerate(run(layout, prefix)):
        found = Expected()
        data_parallel(layout, found, norm=rank >= 2)
        pipeline(layout, found)
        everyone(layout, found)
        assert seen == found.seen()  # the stages have told each other of their statistics in the first step


def test_what_it_cannot_count_is_an_error() -> None:
    """A collective that nobody has thought of must not be overlooked."""
    with pytest.raises(RuntimeError, match=r"moe_train\.parallel\.traffic does not know c10d::gather_"):
        run_ranks(2, gather)


def gather() -> None:
    import torch
    import torch.distributed as dist

    from moe_train.parallel.mesh import make_layout, start_world
    from moe_train.parallel.traffic import Traffic

    config = parse({"train": {"device": "cpu", "micro_batch_size": 4}}, "test")
    layout = make_layout(config.parallel, start_world(config))
    with Traffic(layout):
        dist.gather(torch.zeros(2), [torch.zeros(2), torch.zeros(2)] if dist.get_rank() == 0 else None)
