"""Killed with SIGKILL at any moment and started again, a run gives bitwise what it gives when nobody stops it."""

import random
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from corpora import write_corpus
from launches import Launch, launch
from tiny_run import rows, words_for
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_train.checkpoint import dcp, examine
from moe_train.checkpoint.manifest import read_manifest

EVERY = 3  # steps between checkpoints
PATIENCE = 2.0  # seconds
TIMINGS = {"tokens_per_second", "step_seconds", "mfu", "mfu_full"}
TIMINGS |= {"slowest_rank", "slowest_seconds", "others_seconds"}
NUMBERS = re.compile(r"^step +(\d+)/", re.MULTILINE)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The router's balance loss uses the step before: a buffer that must survive."""
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text", documents=100)
    own = [f"checkpoint.every={EVERY}", "eval.every=5", "eval.max_rows=4", "sample.max_tokens=0", "train.device=cpu"]
    return [*words_for(prefix), *own, "train.micro_batch_size=2", "model.router.balance_scope=global_batch"]


def wait_for_step(run: Launch, step: int) -> None:
    while not any(int(n) >= step for n in NUMBERS.findall(run.stdout)):
        assert run.running, run.stderr
        time.sleep(0.002)


def wait_for_save(run: Launch, folder: Path) -> None:
    while not any(folder.glob("checkpoints/.tmp-step-*")):
        assert run.running, run.stderr
        time.sleep(0.0005)


def kill_at(
    words: list[str], folder: Path, ranks: int, step: int, saving: bool, delay: float, victim: int | None = None
) -> bool:
    """Start the run, kill it `delay` seconds after `step` or in the save that follows; whether it was saving.

    `victim`: the rank that is killed; the others get PATIENCE seconds to end. None = all at once.
    """
    found = dcp.checkpoints(folder / "checkpoints")
    run = Launch("pretrain", *words, f"run.dir={folder}", ranks=ranks)
    wait_for_step(run, step)
    if saving:
        wait_for_save(run, folder)
    time.sleep(delay)
    if victim is not None:
        run.processes[victim].kill()
        end = time.monotonic() + PATIENCE
        while run.running and time.monotonic() < end:
            time.sleep(0.01)
    run.kill()
    if found:
        assert f"resumed at step {dcp.step_of(found[-1])} from {found[-1]}" in run.stdout
    for path in folder.glob("checkpoints/step-*"):  # nothing has its final name that is not whole
        assert read_manifest(path)["step"] == dcp.step_of(path)
        assert not list(examine.problems(path))
    return any(folder.glob("checkpoints/.tmp-step-*"))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, of model and optimizer."""
    metadata = torch_dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {
        k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        torch_dcp.load(found, checkpoint_id=str(path), no_dist=True)
    return found


def figures(folder: Path, kind: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows(folder, kind)]


def assert_same(folder: Path, whole: Path, steps: int) -> None:
    assert [row["step"] for row in rows(folder)] == list(range(1, steps + 1))
    assert figures(folder, "train") == figures(whole, "train")
    assert figures(folder, "eval") == figures(whole, "eval")
    names = [[path.name for path in dcp.checkpoints(run / "checkpoints")] for run in (folder, whole)]
    assert names[0] == names[1] == [f"step-{steps - EVERY:08d}", f"step-{steps:08d}"]
    assert not list(folder.glob("checkpoints/.*"))
    killed, expected = (tensors(run / "checkpoints" / names[0][-1]) for run in (folder, whole))
    assert killed.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in expected)
    different = [name for name, value in expected.items() if not torch.equal(killed[name], value)]
    assert not different


def compare(words: list[str], tmp_path: Path, ranks: int, steps: int, kills: int, saves: int) -> None:
    """Kill one run `kills` times, `saves` of them inside a save, and compare it with one that nobody stops."""
    chance = random.Random(ranks)
    words = [*words, f"train.steps={steps}"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = launch("pretrain", *words, f"run.dir={whole}", ranks=ranks)
    assert done.returncode == 0, done.stderr
    saving = chance.sample([True] * saves + [False] * (kills - saves), kills)
    hits = 0
    for step, inside in zip(sorted(chance.sample(range(1, steps // 2), kills)), saving, strict=True):
        for _ in range(3 if inside and not hits else 1):  # on a busy machine the save may be over before the kill
            victim = 1 if ranks > 1 and not inside else None
            hit = kill_at(words, folder, ranks, step, inside, chance.uniform(0.0, 0.02) if hits else 0.0, victim)
            hits += hit
            if hit:
                break
    assert hits, "no kill hit a save"
    done = launch("pretrain", *words, f"run.dir={folder}", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert_same(folder, whole, steps)


def test_killed_twice_once_inside_a_save(words: list[str], tmp_path: Path) -> None:
    compare(words, tmp_path, ranks=2, steps=15, kills=2, saves=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_twenty_times(words: list[str], tmp_path: Path, ranks: int) -> None:
    compare(words, tmp_path, ranks, steps=48, kills=20, saves=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_thirty_times_inside_saves(words: list[str], tmp_path: Path) -> None:
    """One rank or both, at any moment of a save."""
    chance, steps = random.Random(0), 90
    words = [*words, f"train.steps={steps}"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert launch("pretrain", *words, f"run.dir={whole}", ranks=2).returncode == 0
    hits = misses = 0
    while hits < 30:
        found = dcp.checkpoints(folder / "checkpoints")
        step = min((dcp.step_of(found[-1]) if found else 0) + chance.randint(1, EVERY - 1), steps - EVERY - 1)
        hit = kill_at(words, folder, 2, step, True, chance.uniform(0.0, 0.06), chance.choice([None, 0, 1]))
        hits, misses = hits + hit, misses + (not hit)
        assert misses < 60, "saves are over before the kill"
    done = launch("pretrain", *words, f"run.dir={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same(folder, whole, steps)
