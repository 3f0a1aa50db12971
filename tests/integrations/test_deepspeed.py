"""DeepSpeed runs what the native engine runs: the same losses, gradients and weights, and checkpoints that go from one to the other."""

import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from corpora import write_corpus
from launches import launch
from layouts import tiny
from ranks import run_ranks
from tiny_run import rows, words_for
from torch.distributed.tensor import DTensor

from moe_train import verify
from moe_train.checkpoint import dcp, examine
from moe_train.checkpoint.logical import logical_tensors
from moe_train.cli import merge, parse
from moe_train.engine.choose import make_engine
from moe_train.errors import UserError
from moe_train.evaluate import byte_lengths
from moe_train.faults import bundle
from moe_train.parallel.mesh import start_world
from moe_train.pretraining import data_loader, eval_rows, settle_vocabulary

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
pytest.importorskip("deepspeed")

STEPS, SAVED = 10, 3
LIMIT = 1e-5
TOPK, RECURRENT = {"name": "topk"}, {"name": "recurrent", "router_size": 8}
GLOBAL = {**RECURRENT, "balance_scope": "global_batch"}  # the fractions of the step before: a buffer that must come back, too
RUN = {  # clipped in every step, two micro-batches on each of two ranks
    "model": {"num_layers": 2, "tie_embeddings": True},
    "train": {"steps": STEPS},
    "optim": {"clip_norm": 0.3, "eps": 1e-8, "weight_decay": 0.1},
}
# Stage 3 would not share out so small parameters, and one bucket would hold them all.
SMALL = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
}


class Case(NamedTuple):
    """A way to run DeepSpeed on `ranks`."""

    ranks: int
    stage: int
    ep: int
    router: str

    def __str__(self) -> str:
        return f"{self.router}-{self.ranks}ranks-zero{self.stage}-ep{self.ep}"


# Experts first: a rank on which DeepSpeed has run without them has its backend already, and a user's has not.
LAYOUTS = [(2, 0, 2), (2, 1, 2), (2, 2, 2), (2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1)]
LAYOUTS += [(4, 0, 2), (4, 1, 2), (4, 2, 2), (4, 0, 1), (4, 1, 1), (4, 2, 1), (4, 3, 1)]
STAGES = {f"zero{stage}-ep{ep}": (stage, ep) for stage, ep in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2))}
ROUTERS = {"topk": TOPK, "recurrent": RECURRENT}
CASES = [Case(*layout, router) for layout in LAYOUTS for router in ROUTERS]


class Place(NamedTuple):
    """A corpus and a file of DeepSpeed's options."""

    folder: Path
    prefix: str
    options: str

    def content(self, router: dict[str, Any], stage: int | None = None, ep: int = 1, **sections: Any) -> dict[str, Any]:
        """A run; of the native engine without a `stage`."""
        data = dict.fromkeys(("train", "valid", "test"), self.prefix)
        content = merge(merge(tiny(router), RUN), {"data": {**data, "tokenizer": "bytes"}, "parallel": {"ep": ep}})
        if stage is not None:
            content["engine"] = {"name": "deepspeed", "zero_stage": stage, "deepspeed_json": self.options}
        return merge(content, sections)


class Run:
    """A run on these ranks."""

    def __init__(self, content: dict[str, Any]) -> None:
        config = parse(content, "run")
        world = start_world(config)
        self.config, self.tokenizer = settle_vocabulary(config)
        self.world, self.engine = world, make_engine(self.config, world)
        self.loader = data_loader(self.config, world, self.tokenizer)

    def steps(self, count: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each of the next steps."""
        found = []
        for _ in range(count):
            loss = self.engine.forward_backward(self.loader.next_step()).loss
            found.append((loss, self.engine.step()))
        return found

    def save(self, folder: Path) -> None:
        state = {"loader": self.loader.state_dict()}
        dcp.save(folder, SAVED, self.engine.state_dict(), state, {}, self.engine.logical_state())

    def load(self, folder: Path) -> None:
        state = self.engine.state_dict()
        self.loader.load_state_dict(dcp.load(folder / f"step-{SAVED:08d}", state)["loader"])
        self.engine.load_state_dict(state)
        self.engine.steps_done = SAVED


def differing(run: Run, folder: Path) -> list[str]:
    """Tensors of the state of a run that are not, to the last bit, those of the checkpoint."""
    wrong = []
    for section, tensors in run.engine.state_dict().items():
        there = {tensor.name: tensor for tensor in logical_tensors(folder / f"step-{SAVED:08d}", section)}
        assert there.keys() >= tensors.keys()
        for name, value in tensors.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if not torch.equal(whole, there[name].load()):
                wrong.append(f"{section}.{name}")
    return wrong


def all_of(work: Callable[..., Any], jobs: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`work` for each job on the same ranks: its result, or its traceback, after which ranks are out of step and no other follows."""
    found: dict[str, Any] = {}
    for name, arguments in jobs.items():
        try:
            found[name] = work(*arguments)
        except BaseException:
            found[name] = traceback.format_exc()
            break
    return found


def together(ranks: int, work: Callable[..., Any], jobs: dict[str, tuple[Any, ...]]) -> dict[str, list[Any]]:
    """Results of every job, by rank. New ranks would have to import DeepSpeed again."""
    results = run_ranks(ranks, all_of, work, jobs, timeout=900, patience=600)  # compilation takes minutes
    return {name: [found.get(name, "an earlier job failed") for found in results] for name in jobs}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("deepspeed")
    options = folder / "options.json"
    options.write_text(json.dumps(SMALL))
    return Place(folder, write_corpus(folder / "text"), str(options))


def follow(content: dict[str, Any]) -> list[tuple[float, float]]:
    return Run(content).steps(STEPS)


@pytest.fixture(scope="module")
def native(place: Place) -> dict[str, list[tuple[float, float]]]:
    """Losses and norms of one process by router."""
    found = together(1, follow, {name: (place.content(router),) for name, router in ROUTERS.items()})
    return {name: ranks[0] for name, ranks in found.items()}


@pytest.fixture(scope="module")
def followed(place: Place) -> dict[Case, list[Any]]:
    """Losses and norms under DeepSpeed, of each rank."""
    found: dict[Case, list[Any]] = {}
    for ranks in (2, 4):
        cases = [case for case in CASES if case.ranks == ranks]
        jobs = {str(case): (place.content(ROUTERS[case.router], case.stage, case.ep),) for case in cases}
        results = together(ranks, follow, jobs)
        found |= {case: results[str(case)] for case in cases}
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_the_native_engines(
    case: Case, native: dict[str, list[tuple[float, float]]], followed: dict[Case, list[Any]]
) -> None:
    expected = native[case.router]
    assert min(norm for _, norm in expected) > RUN["optim"]["clip_norm"]  # it is clipped
    assert expected[-1][0] < expected[0][0]
    for rank in followed[case]:
        assert not isinstance(rank, str), rank
        for step, (mine, one) in enumerate(zip(rank, expected, strict=True), 1):
            assert mine == pytest.approx(one, rel=LIMIT, abs=LIMIT), step


# What stage 3 finds hard: parameters used outside of their module's forward, by several layers, before and after the experts.
HARD = {
    "recurrent": GLOBAL,
    "vqmoe": {"name": "vqmoe"},
    "smear": {"name": "smear"},
    "adamix": {"name": "adamix"},
    "hypermoe": {"name": "hypermoe"},  # its own parameters are frozen
    "expert_choice": {"name": "expert_choice"},
    "acmoe": {"name": "acmoe"},
}


def observed(content: dict[str, Any], path: Path) -> dict[str, float]:
    return verify.compare(parse(content, "run"), path)


def record(content: dict[str, Any], path: Path) -> None:
    verify.record(parse(content, "run"), path)


def smooth(place: Place, router: dict[str, Any], **kind: Any) -> dict[str, Any]:
    return place.content(router, optim={"eps": verify.EPS, "clip_norm": 1.0}, **kind)


@pytest.fixture(scope="module")
def compared(place: Place) -> dict[str, list[Any]]:
    """What stage 3 with recomputation, and the other stages, compute beside one process: gradients and weights, too."""
    paths = {name: place.folder / f"{name}.pt" for name in HARD}
    done = together(1, record, {name: (smooth(place, router), paths[name]) for name, router in HARD.items()})
    assert all(ranks == [None] for ranks in done.values()), done
    full = {"recompute": "full"}
    jobs = {name: (smooth(place, router, stage=3, train=full), paths[name]) for name, router in HARD.items()}
    layouts = {name: smooth(place, GLOBAL, stage=stage, ep=ep) for name, (stage, ep) in STAGES.items()}
    jobs |= {name: (content, paths["recurrent"]) for name, content in layouts.items()}
    return together(2, observed, jobs)


@pytest.mark.parametrize("name", [*HARD, *STAGES])
def test_gradients_and_weights_are_those_of_one_process(name: str, compared: dict[str, list[Any]], place: Place) -> None:
    for rank in compared[name]:
        assert not isinstance(rank, str), rank
    path = place.folder / f"{name if name in HARD else 'recurrent'}.pt"
    assert not verify.judge(verify.combine(compared[name], path), "fp32").failures


def transfer(place: Place, stage: int, ep: int) -> tuple[list[Any], list[Any], list[str]]:
    """A run that begins under one engine and goes on under the other, and one that does not change, both ways."""
    under = {"native": place.content(GLOBAL, ep=ep), "deepspeed": place.content(GLOBAL, stage, ep)}
    straight, changed, wrong = [], [], []
    for first, second in (("native", "deepspeed"), ("deepspeed", "native"), ("deepspeed", "deepspeed")):
        folder = place.folder / f"{first}-{second}-{stage}-{ep}"
        run = Run(under[first])
        run.steps(SAVED)
        run.save(folder)
        straight.append(run.steps(STEPS - SAVED))
        other = Run(under[second])
        other.load(folder)
        wrong += [f"{first} to {second}: {name}" for name in differing(other, folder)]
        changed.append(other.steps(STEPS - SAVED))
    return straight, changed, wrong


@pytest.fixture(scope="module")
def transferred(place: Place) -> dict[str, list[Any]]:
    return together(2, transfer, {name: (place, *kind) for name, kind in STAGES.items()})


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_goes_from_one_engine_to_the_other(name: str, transferred: dict[str, list[Any]]) -> None:
    for rank in transferred[name]:
        assert not isinstance(rank, str), rank
        straight, changed, wrong = rank
        assert not wrong
        for mine, one in zip(changed, straight, strict=True):
            assert [x for step in mine for x in step] == pytest.approx([x for step in one for x in step], rel=LIMIT)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: verify.whole(value) for name, value in run.engine.state_dict()["model"].items()}


def refuse(place: Place, stage: int) -> dict[str, Any]:
    """A step that is not accepted, one whose gradients are not finite, and the steps after; evaluation and logits on the way."""
    run, plain = Run(place.content(RECURRENT, stage)), Run(place.content(RECURRENT))
    batch = run.loader.next_step()
    before = weights_of(run)
    result, norms = run.engine.forward_backward(batch), list[float]()
    run.engine.step(accept=lambda norm: bool(norms.append(norm)))
    kept = [name for name, value in weights_of(run).items() if not torch.equal(value, before[name])]
    run.engine.model.parts[0].register_forward_hook(_poison, always_call=False)
    try:
        run.engine.forward_backward(batch)
        run.engine.step()
        failure = "no error"
    except FloatingPointError as error:
        failure = str(error)
    kept += [name for name, value in weights_of(run).items() if not torch.equal(value, before[name])]
    run.engine.model.parts[0]._forward_hooks.popitem()
    run.engine.steps_done = plain.engine.steps_done = 0
    found: list[Any] = []
    for each in (run, plain):
        each.engine.forward_backward(batch)
        norm = each.engine.step()
        rows = eval_rows(each.config, each.world, each.tokenizer, "valid", 8)
        sums = each.engine.evaluate(rows, byte_lengths(each.tokenizer))
        found.append((norm, sums, each.engine.model.logits(torch.arange(16)[None])))
    return {"loss": result.loss, "norms": norms, "changed": kept, "failure": failure, "found": found}


def _poison(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return output._replace(loss=output.loss * math.nan)


@pytest.fixture(scope="module")
def refusals(place: Place) -> dict[str, list[Any]]:
    return together(2, refuse, {f"zero{stage}": (place, stage) for stage in range(4)})


@pytest.mark.parametrize("stage", range(4))
def test_a_refused_step_changes_nothing(stage: int, refusals: dict[str, list[Any]]) -> None:
    for rank in refusals[f"zero{stage}"]:
        assert not isinstance(rank, str), rank
        (mine, sums, logits), (theirs, others, expected) = rank["found"]
        assert rank["changed"] == []
        assert rank["norms"] == pytest.approx([theirs], rel=LIMIT)
        assert "the gradient norm is nan" in rank["failure"]
        assert mine == pytest.approx(theirs, rel=LIMIT)
        assert (sums.targets, sums.bytes) == (others.targets, others.bytes)
        assert sums.nats == pytest.approx(others.nats, rel=LIMIT)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def halves(place: Place, stage: int) -> tuple[list[Any], list[Any], set[str], set[str]]:
    """bf16 under both engines, and the dtypes in which modules read their parameters."""
    half = {"dtype": "bf16"}
    run, plain = Run(place.content(RECURRENT, stage, train=half)), Run(place.content(RECURRENT, train=half))
    layer = run.engine.model.parts[0].layers["0"]
    router, seen = layer.mlp.router, set[str]()
    layer.mlp.experts.register_forward_pre_hook(lambda module, _: seen.add(str(module.gate_up.dtype)))
    wide = {str(p.dtype) for p in router.parameters()} | {str(p.dtype) for p in run.engine.model.parts[0].parameters()}
    return run.steps(STEPS), plain.steps(STEPS), seen, wide


@pytest.fixture(scope="module")
def bf16(place: Place) -> dict[str, list[Any]]:
    return together(2, halves, {f"zero{stage}": (place, stage) for stage in (2, 3)})


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_rounds_as_the_native_engine_does(stage: int, bf16: dict[str, list[Any]]) -> None:
    for rank in bf16[f"zero{stage}"]:
        assert not isinstance(rank, str), rank
        mine, theirs, experts, parameters = rank
        assert experts == {"torch.bfloat16"}
        assert parameters == {"torch.float32"}
        for (loss, norm), (other, other_norm) in zip(mine, theirs, strict=True):
            assert loss == pytest.approx(other, rel=1e-3)
            assert norm == pytest.approx(other_norm, rel=2e-2)


def offloaded(place: Place, stage: int) -> tuple[list[Any], list[str]]:
    """CPUAdam: losses and norms, and what a checkpoint of the native engine gives it."""
    content = merge(place.content(RECURRENT, stage), {"engine": {"offload": "optimizer"}})
    found = Run(content).steps(STEPS)
    folder = place.folder / f"offload-{stage}"
    run = Run(place.content(RECURRENT))
    run.steps(SAVED)
    run.save(folder)
    other = Run(content)
    other.load(folder)
    wrong = differing(other, folder)
    again = other.steps(STEPS - SAVED)
    return [found, [*found[:SAVED], *again]], wrong


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_optimizer_on_the_cpu(place: Place, native: dict[str, list[tuple[float, float]]]) -> None:
    """CPUAdam is compiled first, which takes minutes."""
    for ranks in together(2, offloaded, {str(stage): (place, stage) for stage in (1, 2, 3)}).values():
        for rank in ranks:
            assert not isinstance(rank, str), rank
            losses, wrong = rank
            assert not wrong
            for found in losses:
                assert [x for step in found for x in step] == pytest.approx(
                    [x for step in native["recurrent"] for x in step], rel=LIMIT
                )


def start_offload(place: Place, build: Path) -> None:
    import os

    os.environ["TORCH_EXTENSIONS_DIR"] = str(build)
    Run(merge(place.content(TOPK, 2), {"engine": {"offload": "optimizer"}}))


def test_a_build_that_was_killed_is_named(place: Place) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    build = place.folder / "build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(build))
        lock = Path(_get_build_directory("cpu_adam", False), "lock")
    lock.touch()
    with pytest.raises(UserError, match=r"engine.offload=optimizer: .*cpu_adam/lock .*delete"):
        run_ranks(2, start_offload, place, build)


@pytest.mark.parametrize("kind", [(3, 1), (2, 2), (0, 2)], ids=["zero3", "zero2-ep2", "zero0-ep2"])
def test_a_run_moves_between_engines(kind: tuple[int, int], place: Place, tmp_path: Path) -> None:
    """Two ranks under DeepSpeed begin it, validate, save and sample; one process of the native engine goes on; evaluation opens it."""
    folder = tmp_path / "run"
    words = [*words_for(place.prefix), f"run.dir={folder}"]
    sizes = [f"engine.zero_stage={kind[0]}", f"parallel.ep={kind[1]}"]
    deepspeed = ["engine.name=deepspeed", *sizes, f"engine.deepspeed_json={place.options}"]
    first = launch("pretrain", *words, *deepspeed, "train.steps=4", ranks=2)
    assert first.returncode == 0, first.stderr
    assert (folder / "sample.txt").exists()
    second = launch("pretrain", *words)
    assert second.returncode == 0, second.stderr
    assert "resumed at step 4" in second.stdout
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    again = launch("pretrain", *words, *deepspeed, "train.steps=8", ranks=2)
    assert again.returncode == 0, again.stderr
    evaluated = launch("evaluate", str(folder), "--data", place.prefix)
    assert evaluated.returncode == 0, evaluated.stderr


def test_nan_on_one_rank_under_stage_3_skips_the_step_on_all(place: Place, tmp_path: Path) -> None:
    """Its gradients are NaN twice: the step is computed again, skipped, and kept with the weights before it."""
    three = ["engine.name=deepspeed", "engine.zero_stage=3", f"engine.deepspeed_json={place.options}"]
    saving = ["checkpoint.asynchronous=false", "checkpoint.keep_last=9", "train.micro_batch_size=2"]
    found = {}
    for name, engine in (("native", []), ("deepspeed", three)):
        words = [*words_for(place.prefix), *saving, *engine, f"run.dir={tmp_path / name}"]
        done = launch("../tests/faults/inject", json.dumps({"nan": [3, 1, 2]}), *words, ranks=2)
        assert done.returncode == 0, done.stderr
        assert "warning: step 3: the gradient norm is nan; the step is skipped; kept in" in done.stdout
        found[name] = rows(tmp_path / name)
    assert [row.get("skipped", 0) for row in found["deepspeed"]] == [0, 0, 1, 0, 0, 0]
    faults = rows(tmp_path / "deepspeed", "fault")
    assert [(row["step"], row["action"]) for row in faults] == [(3, "again"), (3, "skip")]
    for mine, other in zip(found["deepspeed"], found["native"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=LIMIT, nan_ok=True)
    kept = bundle.load(tmp_path / "deepspeed" / "faults" / "step-00000003")
    assert kept.ranks == [0, 0, 1, 1]
    before = tmp_path / "deepspeed" / "checkpoints" / "step-00000002"
    assert not [name for name in examine.differences(kept.weights, before) if "model." in name]
    told = launch("replay", str(kept.path))
    assert told.returncode == 0, told.stderr
    assert "everything is finite here: the fault was not in the batch and the weights" in told.stdout


def test_the_layout_proof_puts_one_native_process_beside_deepspeed(place: Place) -> None:
    done = launch(
        "verify",
        "configs/quickstart.yaml",
        "dp_shard=2",
        *words_for(place.prefix)[1:],
        "engine.name=deepspeed",
        "engine.zero_stage=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dp_shard=2" in done.stdout


def test_the_benchmark_times_it_in_one_process(place: Place, tmp_path: Path) -> None:
    words = [*words_for(place.prefix), "engine.name=deepspeed", "--steps", "2", "--warmup", "1"]
    done = launch("benchmark", *words, "--output", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["engine"] == "deepspeed"
    assert row["tokens_per_second"] > 0
