"""A rank that dies or stops in mid-run: the others end with an error that says which one, where and at which step."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from corpora import write_corpus
from launches import Launch
from tiny_run import words_for

from moe_train.parallel.mesh import World
from moe_train.parallel.watch import Watch

TIMEOUT = 12  # seconds of parallel.timeout_seconds
SLACK = 30  # a busy machine: what the report may take on top
NUMBERS = re.compile(r"^step +(\d+)/", re.MULTILINE)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text", documents=100)
    own = ["train.device=cpu", "train.steps=100000", "eval.every=0", "checkpoint.every=0", "train.micro_batch_size=2"]
    return [*words_for(prefix), *own, f"parallel.timeout_seconds={TIMEOUT}"]


class Counted:
    """A store that counts its questions."""

    def __init__(self) -> None:
        self.store, self.questions = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.questions += 1
        return getattr(self.store, name)


def test_all_signs_are_read_at_once_but_where_a_rank_has_not_begun() -> None:
    watches = [Watch(World(rank, 50, torch.device("cpu"), torch.float32, ""), TIMEOUT) for rank in range(50)]
    store = Counted()
    for step, watch in enumerate(watches):
        watch._store, watch.step = store, step
    for watch in watches[:-1]:
        watch._write()
    assert "rank 48: running, at step 48 in " in watches[0].everyone()[48]
    assert len(watches[0].everyone()) == 49
    watches[-1]._write()
    store.questions = 0
    assert len(watches[0].everyone()) == 50
    assert store.questions < 5


def lose(words: list[str], folder: Path, number: int, rank: int = 1) -> tuple[str, float, int]:
    """Send `rank` of two a signal at some step; what the other one wrote, how long it took to end, and the step before."""
    run = Launch("pretrain", *words, f"run.dir={folder}", ranks=2)
    lost, left = run.processes[rank], run.processes[1 - rank]
    try:
        while not (steps := NUMBERS.findall(run.stdout)) or int(steps[-1]) < 5:
            assert run.running, run.stderr
            time.sleep(0.01)
        os.kill(lost.pid, number)
        start = time.monotonic()
        left.join(TIMEOUT + SLACK)
        seconds = time.monotonic() - start
        assert not left.is_alive(), "it hangs with the other one"
        assert left.exitcode not in (0, None)
        return run.read("err", 1 - rank), seconds, int(NUMBERS.findall(run.stdout)[-1])
    finally:
        run.kill()


def check(said: str, before: int, rank: int = 1) -> None:
    found = re.search(
        rf"RankFailure: step (\d+): (\w+) called by \w+ \([a-z_]+\.py:\d+\) failed on rank {1 - rank}: .*"
        rf"rank {rank} gave no sign for [\d.]+ s, last seen at step (\d+) in .*; it was killed or stopped",
        said,
    )
    assert found, said
    assert int(found[1]) - before in (0, 1)
    assert int(found[3]) <= int(found[1])  # signs come every second or two, many of these steps apart
    assert f"parallel.timeout_seconds={TIMEOUT}" in said
    assert said.count("RankFailure: ") == 1


def test_killed(words: list[str], tmp_path: Path) -> None:
    """The connection is lost at once, so nobody waits for the timeout."""
    said, _, step = lose(words, tmp_path / "run", signal.SIGKILL)
    check(said, step)
    assert "RankFailure" in (tmp_path / "run" / "error-rank0.log").read_text()


def test_stopped(words: list[str], tmp_path: Path) -> None:
    said, seconds, step = lose(words, tmp_path / "run", signal.SIGSTOP)
    check(said, step)
    assert seconds > 0.5 * TIMEOUT


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_rank_that_holds_the_store(number: int, words: list[str], tmp_path: Path) -> None:
    """Without torchrun the store is in rank 0; its lines are lost with it, and nothing hangs on that."""
    said, _, _ = lose(words, tmp_path / "run", number, rank=0)
    assert "the store does not answer: the process that holds it (torchrun, or rank 0) has ended or hangs" in said
    assert re.search(r"RankFailure: step \d+: \w+ called by .* failed on rank 1", said), said
