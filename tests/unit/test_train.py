"""A run from the command line: what it leaves, what it prints, how it goes on, and what the tools make of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import write_corpus

ROOT = Path(__file__).parents[2]
MODEL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=4", "model.ffn_hidden_size=32"]
TRAIN = ["train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every=1", "train.steps=6"]
REST = ["checkpoint.every=2", "eval.every=3", "eval.max_rows=8", "sample.max_tokens=8", "optim.warmup_steps=2"]


def tool(script: str, *words: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, f"launch/{script}.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)


def rows(folder: Path, kind: str = "train") -> list[dict]:
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    data = [f"data.{split}={prefix}" for split in ("train", "valid", "test")]
    return ["configs/quickstart.yaml", *MODEL, *TRAIN, *REST, *data, "data.tokenizer=bytes", "model.router.router_size=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = tool("pretrain", *words, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr
    return folder


def test_the_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    expected = {
        "config.yaml",
        "tokenizer",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "loss.png",
        "experts.png",
        "sample.txt",
    }
    assert expected <= names
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "cross_entropy", "grad_norm", "lr", "tokens_per_second", "mfu", "load_max_mean"} <= found[-1].keys()
    assert found[-1]["loss"] < found[0]["loss"]
    assert [(row["step"], row["split"]) for row in rows(run, "eval")] == [(3, "valid"), (6, "valid"), (6, "test")]
    assert rows(run, "eval")[-1]["bits_per_byte"] > 0


def test_going_on_gives_the_same_losses(run: Path, words: list[str], tmp_path: Path) -> None:
    """Stopped after its checkpoint at step 4, then started again."""
    folder = tmp_path / "stopped"
    assert tool("pretrain", *words, f"run.dir={folder}").returncode == 0
    for path in (folder / "checkpoints").glob("step-00000006*"):
        path.rename(tmp_path / "away")
    done = tool("pretrain", *words, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(run)]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_going_on_with_other_ranks(run: Path, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "two"
    assert tool("pretrain", *words, f"run.dir={folder}", "train.steps=4", "optim.min_lr=0.0004").returncode == 0
    done = tool("pretrain", *words, f"run.dir={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(number: int, run: Path, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    long = [sys.executable, "launch/pretrain.py", *words, f"run.dir={folder}", "train.steps=100000", "checkpoint.every=0"]
    process = subprocess.Popen(long, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(number)
            break
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"stopped by {signal.Signals(number).name}" in output
    last = rows(folder)[-1]["step"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_gradients_that_are_not_finite_end_the_run(run: Path, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "burst"
    done = tool("pretrain", *words, f"run.dir={folder}", "optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=null")
    assert done.returncode == 1
    log = (folder / "error-rank0.log").read_text()
    assert "the gradient norm is nan" in log
    assert "layers.0" in log
    assert "FloatingPointError" in done.stderr


def test_sampling_is_repeatable(run: Path) -> None:
    one, two = (tool("generate", str(run), "--prompt", "def ", "--max-tokens", "20", "--seed", "3") for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("def ")
    assert tool("generate", str(run), "--prompt", "def ", "--max-tokens", "20", "--seed", "4").stdout != one.stdout


def test_evaluation_of_a_checkpoint_is_what_training_said(run: Path, words: list[str]) -> None:
    prefix = next(w for w in words if w.startswith("data.test=")).split("=")[1]
    done = tool("evaluate", str(run / "checkpoints" / "step-00000006"), "--data", prefix)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bits_per_byte"] == pytest.approx(rows(run, "eval")[-1]["bits_per_byte"], rel=1e-6)


def test_evaluation_of_a_text_file(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def x(self.y)\n" * 20)
    done = tool("evaluate", str(run), "--data", str(text))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] == 14 * 20 - 1  # nothing predicts the first byte


@pytest.mark.parametrize(
    ("script", "call", "part"),
    [
        ("generate", ["{tmp}"], "neither a checkpoint nor a run folder"),
        ("evaluate", ["{run}", "--data", "{tmp}/gone.txt"], "neither a prepared corpus"),
        ("pretrain", ["{run}/config.yaml", "model.hidden_size=64"], "holds a run with another model"),
        (
            "pretrain",
            [
                "configs/quickstart.yaml",
                "data.tokenizer=bytes",
                "data.train={tmp}/gone",
                "data.valid=a",
                "data.test=b",
                "run.dir={tmp}/r",
            ],
            "gone",
        ),
        ("pretrain", ["configs/quickstart.yaml", "data.tokenizer={tmp}/gone", "run.dir={tmp}/r"], "gone"),
        (
            "pretrain",
            ["configs/quickstart.yaml", "data.tokenizer=bytes", "model.vocab_size=8", "run.dir={tmp}/r"],
            "smaller than the 257 ids",
        ),
    ],
)
def test_mistakes_are_one_message(run: Path, tmp_path: Path, script: str, call: list[str], part: str) -> None:
    done = tool(script, *(word.format(run=run, tmp=tmp_path) for word in call))
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["state.json", ".metadata", "config.yaml", "__0_0.distcp"])
def test_a_truncated_checkpoint_is_refused(run: Path, tmp_path: Path, victim: str) -> None:
    copy = tmp_path / "step-00000006"
    subprocess.run(["cp", "-r", str(run / "checkpoints" / "step-00000006"), str(copy)], check=True)
    file = copy / victim
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = tool("generate", str(copy))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
