"""Steps that go wrong: skipped on all ranks, kept, computed again; spikes, collapse; a save on demand; ranks that hang or are slow."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from launches import Launch, launch
from models import batch_of, config_of, decoder_of
from ranks import run_ranks
from tiny_run import rows, words_for

from moe_train.checkpoint import dcp, examine
from moe_train.cli import merge, parse
from moe_train.config.faults import FaultsSection
from moe_train.data.tokenizer import load_tokenizer
from moe_train.engine.base import StepResult
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.faults import bundle
from moe_train.faults.detect import Detector, Finding
from moe_train.faults.replay import Hooks
from moe_train.parallel.mesh import start_world
from moe_train.pretraining import data_loader

INJECT = "../tests/faults/inject"
OWN = ["train.device=cpu", "train.micro_batch_size=2", "sample.max_tokens=0", "eval.every=0", "eval.max_rows=4"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpus")
    held_out = write_corpus(folder / "held-out", documents=3, seed=1)
    other = [f"data.{split}={held_out}" for split in ("valid", "test")]
    return [*words_for(write_corpus(folder / "text", documents=100)), *OWN, *other]


def faults(**spec: object) -> str:
    return json.dumps(spec)


# --- What is found --------------------------------------------------------------------------------------------------------------


def result(loss: float, loads: list[int] | None = None, entropy: float = 1.0) -> StepResult:
    stats = {"tokens_per_expert": torch.tensor(loads or [5, 5, 5, 5]), "entropy": torch.tensor(entropy * 20)}
    return StepResult(loss, loss, {"0": stats})


def filled(**keys: object) -> Detector:
    detector = Detector(FaultsSection(window=8, **keys))
    for i in range(8):
        assert not detector.look(result(2.0 + 0.01 * (i % 3)), 1.0 + 0.1 * (i % 2), 20)
        detector.keep(result(2.0 + 0.01 * (i % 3)), 1.0 + 0.1 * (i % 2))
    return detector


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_skipped_from_the_first_step(loss: float, norm: float) -> None:
    (found,) = Detector(FaultsSection()).look(result(loss), norm, 20)
    assert (found.cause, found.action) == ("nonfinite", "skip")


def test_spikes() -> None:
    detector = filled(loss_spike="skip", grad_spike="stop")
    assert not detector.look(result(2.3), 1.5, 20)
    (loss,) = detector.look(result(4.0), 1.0, 20)
    assert (loss.cause, loss.action) == ("loss_spike", "skip")
    assert "the loss 4 is 4" in loss.text
    assert "sigmas above 2.01, the median (faults.spike_sigmas=10)" in loss.text
    assert [found.cause for found in detector.look(result(4.0), 50.0, 20)] == ["grad_spike", "loss_spike"]  # the gravest first
    assert not filled(loss_spike="off").look(result(400.0), 1.0, 20)
    assert not Detector(FaultsSection(loss_spike="skip")).look(result(400.0), 1.0, 20)  # nothing to compare with


def test_a_window_goes_with_the_checkpoint() -> None:
    before, after = filled(), Detector(FaultsSection(window=8))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.look(result(4.0), 1.0, 20) == before.look(result(4.0), 1.0, 20) != []
    with pytest.raises(UserError, match="no window of steps"):
        after.load_state_dict({"losses": 3})


@pytest.mark.parametrize(("loads", "entropy"), [([20, 0, 0, 0], 1.0), (None, 1e-3)])
def test_collapse_is_said_once_when_it_has_lasted(loads: list[int] | None, entropy: float) -> None:
    detector = Detector(FaultsSection(window=4))
    looks = [detector.look(result(2.0, loads, entropy), 1.0, 20) for _ in range(9)]
    assert [len(found) for found in looks] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert isinstance(looks[3][0], Finding)
    assert looks[3][0].text.startswith("router of layer 0: ")
    detector.look(result(2.0), 1.0, 20)  # one good step, and the count starts anew
    assert [len(detector.look(result(2.0, loads, entropy), 1.0, 20)) for _ in range(4)] == [0, 0, 0, 1]
    stops = Detector(FaultsSection(window=4, collapse="stop"))
    assert [len(stops.look(result(2.0, loads, entropy), 1.0, 20)) for _ in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("part", ["layers.1.mlp.router", "layers.1.mlp.experts", "norm"])
def test_hooks_find_the_first_module(part: str) -> None:
    model = decoder_of(config_of({"name": "topk"}).model)
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).fill_(torch.nan)
    batch, targets = batch_of([[5, 3]])
    found: list[str] = []
    with Hooks(model, found.append):
        model(batch, targets)
    assert re.match(rf"forward: an output of {part} \(", found[0]), found[:3]
    found.clear()
    model(batch, targets)
    assert not found  # the hooks are gone


# --- Runs -----------------------------------------------------------------------------------------------------------------------


def test_nan_on_one_rank_skips_the_step_on_all(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        INJECT,
        faults(nan=[3, 1, 2]),
        *words,
        f"run.dir={run}",
        "checkpoint.asynchronous=false",
        "checkpoint.keep_last=9",
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: step 3: the gradient norm is nan; the step is skipped; kept in" in done.stdout
    assert [row.get("skipped", 0) for row in rows(run)] == [0, 0, 1, 0, 0, 0]
    assert [(row["step"], row["action"]) for row in rows(run, "fault")] == [(3, "again"), (3, "skip")]
    assert "the gradient norm is nan" in (run / "log.txt").read_text()
    kept = bundle.load(run / "faults" / "step-00000003")
    assert kept.ranks == [0, 0, 1, 1]
    assert kept.facts["checkpoint"] == "step-00000002"
    differences = list(examine.differences(kept.weights, run / "checkpoints" / "step-00000002"))
    assert not [difference for difference in differences if "model." in difference]  # the optimizer's state is not in it
    told = launch("replay", str(kept.path))
    assert told.returncode == 0, told.stderr
    then, now = map(float, re.search(r"^loss then (\S+), now (\S+)$", told.stdout, re.MULTILINE).groups())
    assert then == pytest.approx(now, rel=1e-5)
    assert "everything is finite here: the fault was not in the batch and the weights" in told.stdout
    (kept.path / bundle.BATCH_FILE).write_bytes(b"torn")
    told = launch("replay", str(kept.path))
    assert (told.returncode, told.stderr.count("error: ")) == (2, 1)
    assert "no bundle that can be replayed" in told.stderr


def test_nan_that_does_not_come_again_leaves_no_trace(words: list[str], tmp_path: Path) -> None:
    spoilt, sound = tmp_path / "spoilt", tmp_path / "sound"
    done = launch(INJECT, faults(nan=[3, 1, 1]), *words, f"run.dir={spoilt}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "warning: step 3: the gradient norm is nan; the step is computed again" in done.stdout
    assert launch("pretrain", *words, f"run.dir={sound}", ranks=2).returncode == 0
    for key in ("loss", "grad_norm", "layers"):
        assert [row[key] for row in rows(spoilt)] == [row[key] for row in rows(sound)]
    differences = list(examine.differences(*(dcp.find(run) for run in (spoilt, sound))))
    assert [line.split(":")[1] for line in differences] == [" run.dir"]


def refused(prefix: str) -> tuple[set[str], set[str], dict[str, list[float]], list[bool]]:
    """A first step that is not used: names that are saved, and have to be, two values, and whether the next update is the first."""
    content = {"data": {"train": prefix, "tokenizer": "bytes"}, "train": {"seq_len": 32, "global_batch_size": 4}}
    config = config_of({"name": "topk"}, vocab_size=320).model_dump(exclude_unset=True)
    run = parse(merge(config, merge(content, {"train": {"micro_batch_size": 4, "device": "cpu"}})), "test")
    world, tokenizer = start_world(run), load_tokenizer("bytes")
    batch = data_loader(run, world, tokenizer).next_step()
    saved, plain = NativeEngine(run, world), NativeEngine(run, world)
    for engine in (saved, plain):
        engine.forward_backward(batch)
        engine.step(lambda norm: False)
    state = saved.state_dict()["optimizer"]
    expected = {name.removeprefix("optimizer.") for name in saved.logical_state() if name.startswith("optimizer.")}
    values = {name: [float(state[f"state.norm.weight.{name}"].sum())] for name in ("step", "exp_avg")}
    for engine in (saved, plain):
        engine.forward_backward(batch)
        engine.step()
    pairs = zip(saved.model.named_parameters(), plain.model.named_parameters(), strict=True)
    return set(state), expected, values, [torch.equal(a, b) for (_, a), (_, b) in pairs]


def test_a_first_step_that_is_skipped_can_be_saved(tmp_path: Path) -> None:
    ((saved, expected, values, equal),) = run_ranks(1, refused, write_corpus(tmp_path / "text"))
    assert saved == expected
    assert values == {"step": [0.0], "exp_avg": [0.0]}
    assert all(equal)


def test_a_poisoned_batch_stops_the_run_and_is_kept(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ["train.steps=34", "faults.window=6", "faults.loss_spike=stop", "checkpoint.every=5", f"run.dir={run}"]
    done = launch(INJECT, faults(poison=32), *words, *own)
    assert done.returncode == 2
    assert re.search(
        r"^error: step 32: the loss .* sigmas above .*; faults.loss_spike=stop. python launch/replay.py",
        done.stderr,
        re.MULTILINE,
    )
    assert "Traceback" not in done.stderr
    assert dcp.checkpoints(run / "checkpoints")[-1].name == "step-00000030"
    kept = bundle.load(run / "faults" / "step-00000032")
    assert int(kept.batch.microbatches[0].tokens.min()) >= 128
    done = launch("pretrain", *words, *own)  # the same command, with sound data
    assert done.returncode == 0, done.stderr
    assert "resumed at step 30" in done.stdout
    assert [row["step"] for row in rows(run)] == list(range(1, 35))


def test_sigusr1_saves_and_goes_on(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    going = Launch("pretrain", *words, f"run.dir={run}", "train.steps=100000", "checkpoint.every=0", ranks=2)
    try:
        while "step      3/" not in going.stdout:
            assert going.running, going.stderr
            time.sleep(0.01)
        os.kill(going.processes[1].pid, signal.SIGUSR1)  # one rank alone
        while "as a signal asks" not in going.stdout:
            assert going.running, going.stderr
            time.sleep(0.01)
        step = int(re.search(r"^saving step (\d+), as a signal asks", going.stdout, re.MULTILINE)[1])
        while f"step {step + 3:>6}/" not in going.stdout:
            assert going.running, going.stderr
            time.sleep(0.01)
        while not (found := dcp.checkpoints(run / "checkpoints")):  # it is written in the background
            assert going.running, going.stderr
            time.sleep(0.01)
        (saved,) = found
        assert dcp.step_of(saved) == step
        assert not list(examine.problems(saved))
    finally:
        going.kill()


def test_a_rank_that_hangs_and_one_that_is_slow(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ["train.steps=8", "train.log_every=4", "faults.hang_seconds=1.5", "checkpoint.every=0", f"run.dir={run}"]
    own.append("faults.straggler_factor=1.2")  # busy machines make the other one slow, too
    done = launch(INJECT, faults(late=[5, 1, 4.0], slow=[1, 0.3]), *words, *own, ranks=2)
    assert done.returncode == 0, done.stderr
    logs = [(run / "logs" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    for rank, said in enumerate(logs):
        assert re.search(rf"rank {rank}: step 5: nothing has ended for [\d.]+ s; all ranks", said), said
        assert said.count("step 5: nothing has ended") == 1
        assert f"rank {1 - rank}: running, at step 5 in " in said
        assert "in faulty_batch" in said if rank == 1 else "forward_backward" in said
    assert re.search(r"warning: rank 1 works \d+\.\d\d s of a step, the median of the others \d+\.\d\d s", done.stdout), (
        done.stdout
    )
    assert [row["slowest_rank"] for row in rows(run) if row["step"] in (4, 8)] == [1, 1]  # not in the first, which warms up
