"""Training with memory: a row sees hidden rows of the row before in its stream, and no gradient goes there."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_corpus
from launches import launch
from layouts import BASE, FP64, Bench, Case
from models import TOPK, batch_of, config_of, decoder_of
from ranks import run_ranks
from tiny_run import rows, words_for
from torch import Tensor
from torch.nn import functional as F

from moe_train.checkpoint import dcp
from moe_train.checkpoint.examine import differences
from moe_train.checkpoint.manifest import read_manifest
from moe_train.cli import load_run, merge, parse
from moe_train.config import Config
from moe_train.data.loader import EvalRows, Loader, MicroBatch, StepBatch
from moe_train.engine import memory
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.model.decoder import Decoder
from moe_train.model.moe import run_directly
from moe_train.model.routing import BatchInfo, Carry
from moe_train.model.transformer_xl import Memory
from moe_train.parallel.mesh import start_world

KINDS = ("table", "relative")
PAPERS = Path(__file__).parents[2] / "configs" / "papers"
S, STREAMS = 16, 8


def model_for(kind: str, **keys: Any) -> Decoder:
    keys = {"attn_type": kind, "residual": "single", **({"attn_span": 7} if kind == "table" else {}), **keys}
    sizes = {"num_layers": len(keys.get("layers", "sgsg")) // 2, "init_std": 0.3}
    return decoder_of(config_of(keys.pop("router", TOPK), block="transformer_xl", transformer_xl=keys, **sizes).model)


def segments(batch: BatchInfo, targets: Tensor, size: int) -> list[tuple[BatchInfo, Tensor]]:
    """Rows of one document, cut; positions go on."""
    cuts = [slice(start, start + size) for start in range(0, targets.shape[1], size)]
    names = ("tokens", "positions", "doc_ids", "labels")
    return [(replace(batch, **{n: getattr(batch, n)[:, cut] for n in names}), targets[:, cut]) for cut in cuts]


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# What the model sees


def by_hand(model: Decoder, batch: BatchInfo, targets: Tensor, size: int, most: int) -> Tensor:
    """The loss of segments, layer after layer over the whole rows: what comes from earlier segments is cut out of them, detached."""
    carry = model.start(batch)
    x = carry.hidden
    for layer in model.layers.values():
        outs = []
        for i, (part, _) in enumerate(segments(batch, targets, size)):
            start = i * size
            kept = x[:, max(start - most, 0) : start].detach()
            own = x[:, start : start + size]
            rows = torch.cat([kept, own], 1)
            outs.append(layer.attention(own, rows, part, model.positions(part, kept.shape[1])))
        u = layer.attention_norm(x + torch.cat(outs, 1))
        if layer.dense_norm is not None and layer.moe_norm is None:
            x = layer.dense_norm(u + layer.mlp(u, batch))
        else:
            mixed, carry, *_ = layer.mlp(u, carry, batch, None, run_directly)
            x = layer.moe_norm(u + mixed)
    return model.finish(Carry(x, carry.state, carry.loss), {}, batch, targets).loss


@pytest.mark.parametrize(("layers", "most"), [("sg", 12), ("sg", 3), ("sgsfsg", 12), ("sgsfsg", 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_segments_by_hand(kind: str, layers: str, most: int) -> None:
    """The recurrence with its stopped gradients, written out."""
    router = {**TOPK, "balance_weight": 0.0}
    batch, targets = batch_of([[12], [12]])
    found = []
    for call in (by_hand, in_segments):
        model = model_for(kind, layers=layers, router=router)
        loss = call(model, batch, targets, 4, most)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def in_segments(model: Decoder, batch: BatchInfo, targets: Tensor, size: int, most: int) -> Tensor:
    kept, total = Memory.start(len(targets), most), torch.zeros((), dtype=torch.float64)
    for part, wanted in segments(batch, targets, size):
        output = model(part, wanted, cache=kept)
        kept, total = output.cache, total + output.loss
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_with_memory_is_the_long_row_cut(kind: str) -> None:
    """With one layer memory holds embeddings: the loss is that of the whole row, and so are all gradients but the embeddings'."""
    batch, targets = batch_of([[12], [12]])
    found = []
    for size in (12, 4):
        model = model_for(kind, layers="sg", router={**TOPK, "balance_weight": 0.0})
        loss = in_segments(model, batch, targets, size, 12)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    embedding = [grads.pop("embedding.weight") for _, grads in found]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=0)
    assert float((embedding[0] - embedding[1]).abs().max()) > 1e-4  # keys of earlier segments get no gradient
    for name, grad in found[0][1].items():
        same = torch.allclose(grad, found[1][1][name], rtol=1e-9, atol=1e-12)
        assert same, name


def test_no_gradient_goes_into_memory() -> None:
    model = model_for("relative")
    batch, targets = batch_of([[12], [12]])
    (first, wanted), (second, after) = segments(batch, targets, 6)
    kept = model(first, wanted, cache=Memory.start(2, 6)).cache
    assert not any(rows.requires_grad for past in kept.layers.values() for rows in past.seen)
    before = set(first.tokens.flatten().tolist()) - set(second.tokens.flatten().tolist())
    assert before
    model(second, after, cache=kept).loss.backward()
    assert float(model.embedding.weight.grad[sorted(before)].abs().max()) == 0


def test_both_passes_of_a_router_that_needs_two_see_memory_and_the_first_one_leaves_it() -> None:
    model = model_for("relative", router={"name": "adamix"})
    batch, targets = batch_of([[12], [12]])
    (first, wanted), (second, after) = segments(batch, targets, 6)
    output = model(first, wanted, cache=Memory.start(2, 6))
    alone = model.run_layers(model.start(first), first, Memory.start(2, 6))[2]
    for name, past in output.cache.layers.items():
        torch.testing.assert_close(past.seen[0], alone.layers[name].seen[0], rtol=1e-12, atol=1e-12)
    without = model(second, after).token_loss
    assert not torch.allclose(model(second, after, cache=output.cache).token_loss, without, atol=1e-4)


# What the engine keeps between steps


def run_of(prefix: str, most: int = 24, router: dict | None = None, **train: Any) -> dict[str, Any]:
    model = {
        "num_layers": 2,
        "block": "transformer_xl",
        "router": router or {"name": "recurrent", "router_size": 8},
        "transformer_xl": {"attn_span": 32, "dropout": 0.1, "layers": "sgsg"},
    }
    sizes = {"seq_len": S, "global_batch_size": STREAMS, "memory": most, **train}
    data = {"train": prefix, "valid": prefix, "test": prefix, "order": "contiguous"}
    return merge(BASE, {"model": model, "train": sizes, "data": data})


def loader_of(config: Config, rank: int = 0, ranks: int = 1) -> Loader:
    train = config.train
    sizes = {"seq_len": S, "micro_batch_size": train.micro_batch_size, "global_batch_size": train.global_batch_size}
    return Loader(config.data.train, **sizes, seed=0, dp_rank=rank, dp_size=ranks, contiguous=True)


def cross_entropy(engine: NativeEngine, batch: StepBatch) -> float:
    return engine.forward_backward(batch).cross_entropy


def steps_of(prefix: str) -> dict[str, Any]:
    """Losses of the same untrained weights on the steps of an epoch and one more, with memory and without."""
    found: dict[str, Any] = {}
    for most in (0, 24):
        config = parse(merge(run_of(prefix, most), {"model": {"transformer_xl": {"dropout": 0.0}}}), "test")
        engine, loader = NativeEngine(config, start_world(config)), loader_of(config)
        steps = loader.rows_per_epoch // STREAMS
        batches = [loader.next_step() for _ in range(steps + 1)]
        found[str(most)] = [cross_entropy(engine, batch) for batch in batches]
        found["continues"] = [batch.continues for batch in batches]
        if most:
            found["length"] = engine.memories[0].length
            found["again"] = cross_entropy(engine, replace(batches[1], continues=False))
            engine.step(lambda norm: False)
            found["skipped"] = engine.memories
    return found


def test_memory_is_used_where_rows_go_on_and_only_there(tmp_path: Path) -> None:
    (found,) = run_ranks(1, steps_of, write_corpus(tmp_path / "corpus", documents=20))
    with_memory, without = found["24"], found["0"]
    assert found["continues"] == [False, *[True] * (len(without) - 2), False]
    assert found["length"] == S  # a step after the start of an epoch
    for at, goes_on in enumerate(found["continues"]):
        assert (with_memory[at] != without[at]) == goes_on
    assert found["again"] == without[1]
    assert found["skipped"] == []  # what a step left that was not used may hold anything


def joined(batches: list[StepBatch]) -> MicroBatch:
    """The rows of consecutive steps behind each other, with positions and documents counted over the whole."""
    micros = [micro for batch in batches for micro in batch.microbatches]
    tokens, targets, labels = (torch.cat([getattr(m, name) for m in micros], 1) for name in ("tokens", "targets", "labels"))
    starts = F.pad(targets[:, :-1] < 0, (1, 0))
    columns = torch.arange(tokens.shape[1])
    positions = columns - torch.where(starts, columns, 0).cummax(1).values
    return MicroBatch(tokens, targets, positions, starts.cumsum(1), labels, micros[0].rows)


def steps_and_long_rows(prefix: str) -> dict[str, Any]:
    """Nats of each of four training steps of the same weights, and of the same columns of rows four times as long."""
    layers = {"model": {"transformer_xl": {"attn_span": 4 * S, "dropout": 0.0}, "init_std": 0.3}}
    config = parse(merge(merge(run_of(prefix, 4 * S, micro_batch_size=STREAMS), layers), FP64), "test")
    engine, loader = NativeEngine(config, start_world(config)), loader_of(config)
    batches = [loader.next_step() for _ in range(4)]
    steps = [cross_entropy(engine, batch) * batch.target_count for batch in batches]
    apart = [cross_entropy(engine, replace(batch, continues=False)) * batch.target_count for batch in batches]
    rows = joined(batches)
    with torch.no_grad():
        whole = engine.model.forward(engine.model.batch_info(rows), rows.targets, None).token_loss
    documents = int(rows.doc_ids.max())
    return {"steps": steps, "apart": apart, "long": [float(part.sum()) for part in whole.split(S, 1)], "documents": documents}


def test_training_steps_with_memory_see_what_long_rows_see(tmp_path: Path) -> None:
    """Through loader and engine: as many rows are kept as attention sees, and documents end in the rows."""
    (found,) = run_ranks(1, steps_and_long_rows, write_corpus(tmp_path / "corpus"))
    assert found["documents"] > 0
    assert found["steps"] == pytest.approx(found["long"], rel=1e-6)
    for step, apart in zip(found["steps"][1:], found["apart"][1:], strict=True):
        assert abs(step - apart) > 1e-3 * apart


ROUTERS = ({"name": "recurrent", "router_size": 8, "balance_scope": "sequence"}, {"name": "smear", "segment_size": 3})


def test_ranks_micro_batches_and_recomputation_change_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    run = merge(run_of(bench.prefix, router=ROUTERS[1]), FP64)
    assert not bench.wrong(1, [Case("train.micro_batch_size=4,train.recompute=full", run)])
    assert not bench.wrong(2, [Case("dp_shard=2,sharding=parameters,train.micro_batch_size=1", run)])


def evaluations(prefix: str) -> list[tuple[float, int]]:
    found = []
    for most, size in ((24, 2), (24, 8), (0, 2)):
        config = parse(merge(run_of(prefix, most, micro_batch_size=size), FP64), "test")
        engine = NativeEngine(config, start_world(config))
        streams = EvalRows(prefix, seq_len=S, micro_batch_size=size, streams=STREAMS, max_rows=37)
        sums = engine.evaluate(streams, torch.ones(320, dtype=torch.int64))
        found.append((sums.nats, sums.targets))
    return found


def test_evaluation_has_the_memory_of_training_whatever_the_micro_batches(tmp_path: Path) -> None:
    ((two, eight, none),) = run_ranks(1, evaluations, write_corpus(tmp_path / "corpus"))
    assert two[1] == eight[1] == none[1]
    assert math.isclose(two[0], eight[0], rel_tol=1e-6)  # of fp32 token losses
    assert not math.isclose(two[0], none[0], rel_tol=1e-5)


# Checkpoints


def save(prefix: str, folder: Path, router: dict) -> list[Any]:
    """Two steps, a checkpoint, and two more; what is kept by stream."""
    config = parse(merge(run_of(prefix, router=router), FP64), "test")
    engine, loader = NativeEngine(config, start_world(config)), loader_of(config)
    for _ in range(2):
        engine.forward_backward(loader.next_step())
        engine.step()
    place, state = loader.state_dict(), engine.state_dict()
    dcp.save(folder, 2, state, {}, {}, engine.logical_state())
    kept = {name: value.clone() for name, value in state["memory"].items()}
    return [place, kept, go_on(engine, loader)]


def go_on(engine: NativeEngine, loader: Loader) -> list[float]:
    losses = []
    for _ in range(2):
        losses.append(engine.forward_backward(loader.next_step()).loss)
        engine.step()
    return losses


def resume(prefix: str, folder: Path, place: Any, router: dict, sizes: dict[str, int]) -> list[Any]:
    config = parse(merge(run_of(prefix, router=router, **sizes), FP64), "test")
    world = start_world(config)
    engine, loader = NativeEngine(config, world), loader_of(config, world.rank, world.size)
    loader.load_state_dict(place)
    path = folder / "step-00000002"
    state = engine.state_dict() | dcp.room(read_manifest(path), "memory", engine.keeps)
    dcp.load(path, state)
    engine.load_state_dict(state)
    engine.steps_done = 2
    kept = {name: value.clone() for name, value in engine.state_dict()["memory"].items()}
    return [kept, engine.memories[0].length, go_on(engine, loader)]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router["name"])
def test_a_checkpoint_has_the_memory_of_each_stream_and_goes_on_anywhere(router: dict, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus")
    ((place, kept, losses),) = run_ranks(1, save, prefix, tmp_path, router)
    assert {name.partition(".")[0] for name in kept} == {str(stream) for stream in range(STREAMS)}
    assert kept["3.layers.1.seen.0"].shape == (24, 16)
    size = sum(path.stat().st_size for path in (tmp_path / "step-00000002").glob("*.distcp"))
    tensors = read_manifest(tmp_path / "step-00000002")["tensors"]
    assert size < 2000 * len(tensors) + 8 * sum(
        math.prod(entry.shape) for entry in tensors.values()
    )  # rows, not what they are cut of
    ((same, length, again),) = run_ranks(1, resume, prefix, tmp_path, place, router, {})
    assert again == losses
    assert length == 24
    torch.testing.assert_close(same, kept, rtol=0, atol=0)
    ranks = run_ranks(2, resume, prefix, tmp_path, place, router, {"micro_batch_size": 1})
    spread = ranks[0][0] | ranks[1][0]
    assert len(ranks[0][0]) == len(ranks[1][0]) == len(kept) // 2
    torch.testing.assert_close({name: spread[name] for name in kept}, kept, rtol=0, atol=0)
    assert ranks[0][2] == pytest.approx(losses, rel=1e-12)
    ((_, length, _),) = run_ranks(1, resume, prefix, tmp_path, place, router, {"memory": 5})
    assert length == 5


def test_memory_that_is_not_this_models_is_refused() -> None:
    like = Memory.start(2, 4)
    state = memory.by_stream([like], [range(2)])
    assert state.keys() == {"0.before", "1.before"}
    assert memory.restore(state, [range(2)], like)[0].before.tolist() == [0, 0]
    for wrong in (
        {},
        {"0.before": state["0.before"]},
        state | {"2.before": state["0.before"]},
        state | {"1.before": torch.zeros(1)},
    ):
        with pytest.raises(UserError, match=r"train\.memory=4: the checkpoint's memory is not"):
            memory.restore(wrong, [range(2)], like)


WORDS = ["model.block=transformer_xl", "model.transformer_xl.attn_span=64", "model.transformer_xl.dropout=0.1"]
WORDS += ["data.order=contiguous", "train.memory=40"]


def copy_without_last(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-00000006")
    return to


def test_a_run_with_memory_goes_on_bitwise_and_on_other_ranks(tmp_path: Path) -> None:
    """Through the real command: stopped after its checkpoint at step 4, then started again."""
    words = [*words_for(write_corpus(tmp_path / "corpus", documents=15)), *WORDS]  # 5 steps to an epoch
    whole = tmp_path / "whole"
    assert launch("pretrain", *words, f"run.dir={whole}").returncode == 0
    again, other = copy_without_last(whole, tmp_path / "again"), copy_without_last(whole, tmp_path / "other")
    done = launch("pretrain", *words, f"run.dir={again}")
    assert done.returncode == 0, done.stderr
    assert f"resumed at step 4 from {again / 'checkpoints' / 'step-00000004'}\n" in done.stdout
    ours, theirs = rows(again), rows(whole)
    assert [(row["loss"], row["grad_norm"]) for row in ours] == [(row["loss"], row["grad_norm"]) for row in theirs]
    assert [row["loss"] for row in rows(again, "eval")] == [row["loss"] for row in rows(whole, "eval")]
    checkpoints = [run / "checkpoints" / "step-00000006" for run in (again, whole)]
    assert [line for line in differences(*checkpoints) if "config: run.dir" not in line] == []
    kept = {name for name in read_manifest(checkpoints[0])["tensors"] if name.startswith("memory.")}
    assert len(kept) == 8 * 3  # streams, each with its place in a document and two layers
    done = launch("pretrain", *words, f"run.dir={other}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert [row["loss"] for row in rows(other)] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert [row["loss"] for row in rows(other, "eval")] == pytest.approx([row["loss"] for row in rows(whole, "eval")], rel=1e-5)


@pytest.mark.slow
def test_memory_may_begin_and_end_in_mid_run(tmp_path: Path) -> None:
    words = [*words_for(write_corpus(tmp_path / "corpus", documents=15)), *WORDS, f"run.dir={tmp_path / 'run'}", "eval.every=0"]
    for steps, most in ((2, 40), (4, 0), (6, 40)):
        done = launch("pretrain", *words, f"train.steps={steps}", f"train.memory={most}", "optim.warmup_steps=0")
        assert done.returncode == 0, done.stderr
    assert "train.memory=40 starts with none, which the checkpoint does not hold" in done.stdout


@pytest.mark.slow
def test_evaluation_has_the_memory_of_the_run_unless_told(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "corpus", documents=15)
    assert launch("pretrain", *words_for(text), *WORDS, f"run.dir={tmp_path / 'run'}").returncode == 0
    found = []
    for option in ([], ["--memory", "40"], ["--memory", "0"]):
        done = launch("evaluate", str(tmp_path / "run"), "--data", text, *option)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1])["loss"])
    assert found[0] == found[1] != found[2]


# Keys


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"order": "shuffled"}}, "data.order=shuffled: with train.memory each row must go on"),
        ({"model": {"block": "llama"}}, "model.block=llama: only blocks of transformer_xl see hidden rows"),
        ({"model": {"transformer_xl": {"attn_type": "absolute"}}}, "model.transformer_xl.attn_type=absolute: positions"),
        ({"data": {"mask_documents": False}}, "data.mask_documents=False: with memory a row sees back"),
        ({"data": {"train": ["a", "b"], "weights": [1.0, 2.0]}}, "data.weights=[1.0, 2.0]: rows of a blend cannot go on"),
        ({"sft": {"train": "a.jsonl"}}, "train.memory=8: fine-tuning has examples in its rows"),
        ({"parallel": {"cp": 2}}, "parallel.cp=2: model.block=transformer_xl runs in one process or data parallel"),
    ],
)
def test_what_cannot_train_with_memory_is_refused(content: dict, message: str) -> None:
    base = {"model": {"block": "transformer_xl"}, "data": {"order": "contiguous"}, "train": {"memory": 8}}
    assert parse(base, "test").train.memory == 8
    with pytest.raises(UserError) as error:
        parse(merge(base, content), "test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "most"),
    [("rmoe_medium", 2048), ("rmoe_small", 2048), ("acmoe_switch_medium", 1024), ("acmoe_glam_medium", 2048), ("vqmoe", 512)],
)
def test_papers_train_with_the_memory_of_their_scripts(name: str, most: int) -> None:
    """Those of RMoE and ACMoE remember as far as attention sees."""
    config = load_run(PAPERS / f"{name}.yaml")
    assert (config.train.memory, config.data.order) == (most, "contiguous")
    if config.model.transformer_xl.attn_type == "table":
        assert config.model.transformer_xl.attn_span == most
