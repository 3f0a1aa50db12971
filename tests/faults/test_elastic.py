"""torchrun starts a run again by itself: after a rank was killed, with a node less, and with a node more."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import write_corpus
from launches import ROOT
from tiny_run import rows, words_for
from torchruns import Torchrun

from moe_train.metrics import read_rows

NUMBERS = re.compile(r"^step +(\d+)/", re.MULTILINE)
OWN = [
    "train.device=cpu",
    "train.micro_batch_size=2",
    "sample.max_tokens=0",
    "eval.every=0",
    "eval.max_rows=4",
    "checkpoint.every=5",
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [*words_for(write_corpus(tmp_path / "text", documents=100)), *OWN, f"run.dir={tmp_path / 'run'}"]


def test_a_run_that_could_not_find_its_folder_again_is_refused() -> None:
    code = (
        "from types import SimpleNamespace as S; from moe_train.cli import parse; from moe_train import train; "
        "train.settle(parse({}, 'x'), 'quickstart')"
    )
    environment = os.environ | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert "UserError: run.dir=None: torchrun --max-restarts starts workers again" in done.stderr
    assert "name a folder, run.dir=runs/quickstart" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["--rdzv-backend=private", "--standalone"])
def test_a_killed_rank_comes_back(rendezvous: str, words: list[str], tmp_path: Path, started: list[Torchrun]) -> None:
    """The time from the kill to the next step, and what it is made of, is printed."""
    options = (rendezvous, "--nproc-per-node=2", "--max-restarts=3")
    run = Torchrun(tmp_path / "out", *options, words=[*words, "train.steps=80"])
    started.append(run)
    run.wait_for(r"^step +12/")
    before = len(run.said)
    os.kill(run.workers()[1], signal.SIGKILL)
    start = time.monotonic()
    run.wait_for("RankFailure: ", before)
    failed = time.monotonic() - start
    ready = run.wait_for(r"^ready after (\S+) s: (.*)$", before)
    again = time.monotonic() - start
    run.wait_for(NUMBERS.pattern, ready.end())
    seconds = time.monotonic() - start
    print(
        f"\nthe rank that is left ends after {failed:.1f} s, the run is ready after {again:.1f} s, a step done after {seconds:.1f} s"
    )
    print(f"of which the new processes take {ready[1]} s: {ready[2]}")
    assert run.process.wait(240) == 0, run.said[-3000:]
    assert re.search(r"^resumed at step \d+ from", run.said, re.MULTILINE)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 81))


@pytest.mark.slow
def test_a_node_less_and_a_node_more(words: list[str], tmp_path: Path, started: list[Torchrun]) -> None:
    """--nnodes=1:2 on one machine: two nodes, then one, then two; the batch stays the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = (
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=private",
        f"--rdzv-endpoint=127.0.0.1:{port}",
    )
    options += ("--rdzv-id=run", "--local-addr=127.0.0.1", "--rdzv-conf=last_call_timeout=3,join_timeout=60")
    words = [*words, "train.steps=100000", "parallel.timeout_seconds=20"]
    nodes = []

    def join() -> None:
        nodes.append(Torchrun(tmp_path / f"node{len(nodes)}", *options, words=words))
        started.append(nodes[-1])

    def wait_for_steps(ranks: int, starts: int) -> None:
        """Until so many starts on so many ranks have done some steps; each speaks on one of the nodes."""
        end = time.monotonic() + 120
        while True:
            said = "".join(node.said for node in nodes)
            runs = re.split(r"^run .*?: (?=\d+ rank)", said, flags=re.MULTILINE)[1:]
            if sum(run.startswith(f"{ranks} rank") and len(NUMBERS.findall(run)) > 7 for run in runs) >= starts:
                return
            assert time.monotonic() < end, said[-5000:]
            time.sleep(0.1)

    join()
    time.sleep(1)  # it holds the store
    join()
    wait_for_steps(2, starts=1)
    nodes[1].kill()
    wait_for_steps(1, starts=1)
    join()
    before = len(nodes[0].said)
    nodes[0].wait_for(r"stopped by SIGTERM at step \d+", before)
    wait_for_steps(2, starts=2)
    nodes[2].kill()
    nodes[0].kill()
    steps = [row["step"] for row in read_rows(tmp_path / "run") if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 10
