"""The cluster that tests/slurm/cluster.sh has started around pytest."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from corpora import write_corpus
from jobs import PATIENCE, ROOT, Job, ask
from tiny_run import words_for


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    """Idle nodes before a test, and no job after it."""
    if "SLURM_CONF" not in os.environ:
        pytest.fail("these tests need the SLURM that `make test-slurm` starts around them")
    yield
    ask("scancel", "--user=root")
    end = time.monotonic() + PATIENCE
    while ask("squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.5)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text", documents=100)
    return [*words_for(prefix), "eval.every=0", "sample.max_tokens=0", "train.device=cpu"]


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., Job]:
    """`sbatch OPTIONS launch/slurm/SCRIPT WORDS` with `ranks` on each node and no GPU; the run folder is `run` in tmp_path."""

    def submit(options: list[str], words: list[str], ranks: int, script: str = "pretrain.sbatch", log: str = "%j") -> Job:
        output = tmp_path / f"slurm-{log}.out"
        own = ["--parsable", "--gpus-per-node=0", f"--output={output}", *options]
        environment = os.environ | {"RANKS_PER_NODE": str(ranks), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        call = ["sbatch", *own, f"launch/slurm/{script}", *words]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        return Job(number, tmp_path / f"slurm-{number}.out", tmp_path / "run")

    return submit
