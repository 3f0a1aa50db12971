"""A run from the command line: what it leaves, what it prints, how it goes on, and what the tools make of it."""

import ast
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import write_corpus
from launches import ROOT, Launch, command, launch
from tiny_run import rows, words_for


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return words_for(write_corpus(tmp_path_factory.mktemp("corpus") / "text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = command(*words, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr
    assert re.search(
        r"^ready after \d+\.\d s: imports \d+\.\d, process group .*, data .*, model .*, checkpoint ", done.stdout, re.MULTILINE
    )
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
    assert launch("pretrain", *words, f"run.dir={folder}").returncode == 0
    (folder / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    done = launch("pretrain", *words, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert f"resumed at step 4 from {folder / 'checkpoints' / 'step-00000004'}\n" in done.stdout
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(run)]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_done_evaluates_again_and_changes_no_row(run: Path, words: list[str]) -> None:
    before = rows(run), rows(run, "eval")
    left = run / "checkpoints" / ".tmp-step-00000008"  # by a killed save
    left.mkdir()
    torn, mine = run / ".config.yaml.0123456789ab.tmp", run / ".notes.tmp"
    torn.touch()
    mine.touch()
    done = launch("pretrain", *words, f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    assert (rows(run), rows(run, "eval")) == before
    assert not left.exists()
    assert not torn.exists()
    assert mine.exists()  # not of a run
    mine.unlink()


def test_checkpoints_that_are_kept(words: list[str], tmp_path: Path) -> None:
    keep = ["train.steps=7", "checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3", "eval.every=0"]
    assert launch("pretrain", *words, *keep, f"run.dir={tmp_path / 'run'}").returncode == 0
    assert sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [3, 6, 7]


def test_going_on_with_other_ranks(run: Path, words: list[str], tmp_path: Path) -> None:
    """Under torchrun."""
    folder = tmp_path / "two"
    assert launch("pretrain", *words, f"run.dir={folder}", "train.steps=4", "optim.min_lr=0.0004").returncode == 0
    done = command(*words, f"run.dir={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout
    assert "torch's generators start anew" in done.stdout
    assert re.search(r"^ready after \d+\.\d s: torchrun \d+\.\d, imports", done.stdout, re.MULTILINE)


def test_time_before_the_first_step_is_counted_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.3); from moe_train.startup import Startup; startup = Startup(); "
        "time.sleep(0.2); startup.mark('nap'); print(startup.marks)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    marks = dict(ast.literal_eval(done.stdout))
    assert marks["torchrun"] == 0
    assert marks["imports"] >= 0.3
    assert 0.2 <= marks["nap"] < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(number: int, run: Path, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    asked = Launch("pretrain", *words, f"run.dir={folder}", "train.steps=100000", "checkpoint.every=0")
    while "step      3/" not in asked.stdout:
        assert asked.running, asked.stderr
        time.sleep(0.01)
    asked.signal(number)
    assert asked.wait() == 0
    assert f"stopped by {signal.Signals(number).name}" in asked.stdout
    last = rows(folder)[-1]["step"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    done = launch("pretrain", *words, f"run.dir={folder}", f"train.steps={last + 2}")
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {last}" in done.stdout
    assert [row["step"] for row in rows(folder)] == list(range(1, last + 3))


def test_gradients_that_are_not_finite_end_the_run(run: Path, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "burst"
    done = launch("pretrain", *words, f"run.dir={folder}", "optim.lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=null")
    assert done.returncode == 2
    assert re.search(
        r"^error: step 4: the .* is nan; skipped in a row: 3 steps, as many as faults.max_skipped", done.stderr, re.MULTILINE
    ), done.stderr
    kept = folder / "faults" / "step-00000004"
    assert f"python launch/replay.py {kept}" in done.stderr
    assert [row["cause"] for row in rows(folder, "fault")] == ["nonfinite"] * 6  # each is tried twice
    assert [row.get("skipped", 0) for row in rows(folder)] == [0, 1, 1]  # the third ends the run
    assert not list(folder.glob("checkpoints/step-*"))  # nothing is saved in between
    told = launch("replay", str(kept))
    assert told.returncode == 0, told.stderr
    then, now = re.search(r"^loss then (\S+), now (\S+)$", told.stdout, re.MULTILINE).groups()
    assert float(then) == pytest.approx(float(now), rel=1e-5)
    assert re.search(r"^    first (forward|backward): .* of \S+ \(\w+\): \d+ ", told.stdout, re.MULTILINE), told.stdout
    assert re.search(r"^    gradients: .*layers\.\d+\.", told.stdout, re.MULTILINE), told.stdout


def test_sampling_is_repeatable(run: Path) -> None:
    one, two = (launch("generate", str(run), "--prompt", "def ", "--max-tokens", "20", "--seed", "3") for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("def ")
    assert launch("generate", str(run), "--prompt", "def ", "--max-tokens", "20", "--seed", "4").stdout != one.stdout


def test_evaluation_of_a_checkpoint_is_what_training_said(run: Path, words: list[str]) -> None:
    prefix = next(w for w in words if w.startswith("data.test=")).split("=")[1]
    done = launch("evaluate", str(run / "checkpoints" / "step-00000006"), "--data", prefix)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bits_per_byte"] == pytest.approx(rows(run, "eval")[-1]["bits_per_byte"], rel=1e-6)


def test_evaluation_of_a_text_file(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def x(self.y)\n" * 20)
    done = launch("evaluate", str(run), "--data", str(text), "train.micro_batch_size=2")  # overrides may come last
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] == 14 * 20 - 1  # nothing predicts the first byte


@pytest.mark.parametrize(
    ("script", "call", "part"),
    [
        ("generate", ["{tmp}"], "neither a checkpoint nor a run folder"),
        ("evaluate", ["{run}", "--data", "{tmp}/gone.txt"], "neither a prepared corpus"),
    ],
)
def test_mistakes_are_one_message(run: Path, tmp_path: Path, script: str, call: list[str], part: str) -> None:
    done = launch(script, *(word.format(run=run, tmp=tmp_path) for word in call))
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["manifest.json", ".metadata", "config.yaml", "__0_0.distcp"])
def test_a_truncated_checkpoint_is_refused(run: Path, tmp_path: Path, victim: str) -> None:
    copy = tmp_path / "step-00000006"
    subprocess.run(["cp", "-r", str(run / "checkpoints" / "step-00000006"), str(copy)], check=True)
    file = copy / victim
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = launch("generate", str(copy))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert victim.lstrip(".") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_causal_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    from moe_train import train as trainer
    from moe_train.cli import parse

    def stop(*_: object) -> None:
        raise SystemExit

    for main, said in ((True, 1), (False, 0)):
        caplog.clear()
        monkeypatch.setattr(trainer, "start_world", lambda config, main=main: SimpleNamespace(main=main))
        monkeypatch.setattr(trainer, "settle", lambda config, name: config)
        monkeypatch.setattr(trainer, "check_run", stop)
        router = {"name": "acmoe", "causal": False}
        config = parse({"run": {"dir": "nowhere"}, "model": {"router": router, "vocab_size": 320}}, "test")
        with pytest.raises(SystemExit):
            trainer.train(config, task=lambda config, *_: (config, None))
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN  # it would end a run that has not begun
        assert [r.getMessage().startswith("not a causal model: model.router.causal=false") for r in caplog.records] == [
            True
        ] * said
