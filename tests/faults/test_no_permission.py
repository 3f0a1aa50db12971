"""A checkpoints folder that the run may not write into for a while. Root gives up the right to pass over permissions."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import write_corpus
from launches import ROOT
from tiny_run import rows, words_for

from moe_train.checkpoint import dcp
from moe_train.checkpoint.manifest import read_manifest

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # prctl(2), capabilities(7)
STEPS, EVERY = 40, 2  # so many that this process may stand still for a while


def obey_permissions() -> None:
    """In a child before it becomes another program."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Run:
    """`python launch/pretrain.py WORDS`."""

    def __init__(self, log: Path, words: list[str]) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "launch/pretrain.py", *words],
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=obey_permissions,
        )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, path: Path | None = None, text: str = "") -> None:
        """A folder is there, or a line is written."""
        while not (path.exists() if path is not None else text in self.said):
            assert self.process.poll() is None, self.said
            time.sleep(0.005)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_folder_without_permission_for_a_while(asynchronous: bool, tmp_path: Path) -> None:
    """Each save until then is one line, training goes on, and the next interval saves; nothing half-written stays."""
    words = [*words_for(write_corpus(tmp_path / "text")), "sample.max_tokens=0", "eval.every=0", f"train.steps={STEPS}"]
    own = [f"checkpoint.every={EVERY}", f"checkpoint.keep_last={STEPS}", f"checkpoint.asynchronous={asynchronous}"]
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    run = Run(tmp_path / "log", [*words, *own, "train.device=cpu", f"run.dir={folder}"])
    run.wait_until(path=checkpoints / "step-00000002")
    checkpoints.chmod(0o500)
    run.wait_until(text="is not saved")
    checkpoints.chmod(0o700)
    assert run.process.wait(240) == 0, run.said
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    warnings = [line for line in run.said.splitlines() if line.startswith("warning: ")]
    assert warnings
    for line in warnings:
        assert f"is not saved: {checkpoints}: cannot be written: Permission denied" in line
        assert line.endswith("training goes on, and the next checkpoint is tried as usual")
    refused = [int(line.split()[2]) for line in warnings]
    saved = [dcp.step_of(path) for path in dcp.checkpoints(checkpoints)]
    assert sorted(refused + saved) == list(range(EVERY, STEPS + 1, EVERY))
    assert max(refused) + EVERY in saved
    assert len(list(checkpoints.iterdir())) == len(saved)
    assert all(read_manifest(path)["step"] == dcp.step_of(path) for path in dcp.checkpoints(checkpoints))
