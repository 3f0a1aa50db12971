"""SIGTERM while a checkpoint is being written in the background: it is finished, another one follows, and the run goes on bitwise."""

import re
import signal
import time
from pathlib import Path

import pytest
from corpora import write_corpus
from launches import Launch, launch
from tiny_run import rows, words_for

from moe_train.checkpoint import dcp, examine

STEPS, TRIES = 8, 6
# So large that a checkpoint of 40 MB is not written within a step.
SIZES = [
    "model.hidden_size=256",
    "model.ffn_hidden_size=256",
    "model.num_experts=8",
    "checkpoint.keep_last=9",
    "checkpoint.every=4",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    own = ["train.device=cpu", "train.micro_batch_size=2", "eval.every=0", "sample.max_tokens=0", f"train.steps={STEPS}"]
    return [*words_for(prefix), *SIZES, *own]


def stop_in_save(words: list[str], folder: Path) -> tuple[Launch, bool]:
    """A run of two ranks that gets SIGTERM in its first save, and whether that was still going on afterwards."""
    run = Launch("pretrain", *words, f"run.dir={folder}", ranks=2)
    while not any(folder.glob("checkpoints/.tmp-step-*")):
        assert run.running, run.stderr
        time.sleep(0.0005)
    run.signal(signal.SIGTERM)
    return run, (folder / "checkpoints" / ".tmp-step-00000004").exists()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_a_save_in_flight_is_finished_before_the_last_one(words: list[str], tmp_path: Path) -> None:
    for number in range(TRIES):
        folder = tmp_path / str(number)
        run, hit = stop_in_save(words, folder)
        assert run.wait() == 0, run.stderr
        found = re.search(r"stopped by SIGTERM at step (\d+)", run.stdout)  # not where its last step came first
        if hit and found:
            break
    assert hit, "the save is over before the signal"
    assert found, run.stdout
    stopped = int(found[1])
    assert 4 <= stopped < STEPS
    saved = dcp.checkpoints(folder / "checkpoints")
    assert [dcp.step_of(path) for path in saved] == sorted({4, stopped})
    assert not [problem for path in saved for problem in examine.problems(path)]
    assert not list(folder.glob("checkpoints/.*"))
    done = launch("pretrain", *words, f"run.dir={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {stopped} " in done.stdout
    whole = launch("pretrain", *words, "checkpoint.every=0", f"run.dir={tmp_path / 'whole'}", ranks=2)
    assert whole.returncode == 0, whole.stderr
    assert losses(folder) == losses(tmp_path / "whole")
    assert len(losses(folder)) == STEPS
