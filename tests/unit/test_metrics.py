"""What a run records: rows that survive kills and NaN, router health, throughput, TensorBoard, and what the terminal shows."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_train.flops import Flops
from moe_train.metrics import RunLog, Throughput, read_rows, router_health

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def train_steps(folder: Path, steps: range, start: int = 0, **log) -> None:
    with RunLog(folder, 100, start, live=False, **log) as run:
        for step in steps:
            run.train(step, {"loss": 10.0 / step})


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def steps_of(folder: Path, kind: str = "train") -> list[int]:
    return [row["step"] for row in map(json.loads, lines(folder)) if row["kind"] == kind]


def strict(line: str) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------------------


def test_rows_are_one_object_per_line_with_step_and_loss(tmp_path):
    with RunLog(tmp_path / "new" / "run", 10, live=False) as log:
        log.train(1, {"loss": 0.1 + 0.2, "lr": 1e-3})
        log.evaluation(1, "valid", {"loss": 1.5, "bits_per_byte": 2.0})
    assert [strict(line) for line in lines(tmp_path / "new" / "run")] == [
        {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "lr": 1e-3},
        {"kind": "eval", "step": 1, "split": "valid", "loss": 1.5, "bits_per_byte": 2.0},
    ]


def test_every_row_is_in_the_file_at_once(tmp_path):
    with RunLog(tmp_path, 10, live=False) as log:
        log.train(1, {"loss": 1.0})
        assert len(lines(tmp_path)) == 1


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path, capsys):
    with RunLog(tmp_path, 10, live=False) as log:
        log.train(1, {"loss": math.nan, "lr": 1.0, "layers": {"0": {"entropy": math.inf, "values": [1.0, -math.inf]}}})
        log.train(2, {"loss": torch.tensor(math.inf)})
    first, second = (strict(line) for line in lines(tmp_path))
    assert first["loss"] is None
    assert first["lr"] == 1.0
    assert first["layers"]["0"] == {"entropy": None, "values": [1.0, None]}
    assert first["nonfinite"] == ["loss", "layers.0.entropy", "layers.0.values.1"]
    assert second == {"kind": "train", "step": 2, "loss": None, "nonfinite": ["loss"]}
    assert "loss nan" in capsys.readouterr().out


def test_tensors_and_numpy_values_are_plain_in_the_file(tmp_path):
    with RunLog(tmp_path, 10, live=False) as log:
        log.train(1, {"loss": torch.tensor(1.5), "lr": np.float32(0.5), "counts": torch.tensor([1, 2]), "n": np.int64(3)})
    assert strict(lines(tmp_path)[0]) == {"kind": "train", "step": 1, "loss": 1.5, "lr": 0.5, "counts": [1, 2], "n": 3}


@pytest.mark.parametrize(
    "tail", ["", '{"kind": "train", "step": 8, "lo', '{"kind": "train", "step": 3, "loss"', "\0\0\0\0", "7\n"]
)
def test_resuming_leaves_no_step_twice_and_none_out(tmp_path, tail):
    train_steps(tmp_path, range(1, 8))
    kept = lines(tmp_path)[:5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    train_steps(tmp_path, range(6, 11), start=5)
    assert steps_of(tmp_path) == list(range(1, 11))
    assert lines(tmp_path)[:5] == kept  # byte for byte
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    train_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    train_steps(tmp_path, range(4, 6), start=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_evaluations_after_the_checkpoint_go_too(tmp_path, capsys):
    with RunLog(tmp_path, 10, live=False) as log:
        for step in (1, 2, 3):
            log.train(step, {"loss": 1.0})
            log.evaluation(step, "valid", {"loss": 1.0})
    with RunLog(tmp_path, 10, start_step=2, live=False):
        pass
    assert steps_of(tmp_path) == steps_of(tmp_path, "eval") == [1, 2]
    assert "dropped 2 line(s)" in capsys.readouterr().out


def test_resuming_without_leftovers_does_not_touch_the_file(tmp_path, capsys):
    train_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").stat()
    capsys.readouterr()
    train_steps(tmp_path, range(0), start=3)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert capsys.readouterr().out == ""


def test_a_repeated_evaluation_replaces_the_old_one(tmp_path):
    for loss in (2.0, 1.0):
        with RunLog(tmp_path, 5, start_step=5, live=False) as log:
            log.evaluation(5, "valid", {"loss": loss})
            log.evaluation(5, "test", {"loss": loss})
    assert [(row["split"], row["loss"]) for row in read_rows(tmp_path)] == [("valid", 1.0), ("test", 1.0)]


def test_starting_from_nothing_begins_a_new_file(tmp_path):
    with RunLog(tmp_path, 5, live=False) as log:
        log.evaluation(0, "valid", {"loss": 2.0})
        log.train(1, {"loss": 1.0})
    with RunLog(tmp_path, 5, live=False) as log:
        log.evaluation(0, "valid", {"loss": 3.0})
    assert [row["loss"] for row in read_rows(tmp_path)] == [3.0]


def log_and_die(folder: Path) -> None:
    log = RunLog(folder, 100, live=False)
    for step in range(1, 8):
        log.train(step, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_no_row(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=log_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert steps_of(tmp_path) == list(range(1, 8))


def test_reading_a_folder_without_metrics_gives_nothing(tmp_path):
    assert read_rows(tmp_path) == []


# --- router health ---------------------------------------------------------------------------------------------------------------


def test_router_health_by_hand():
    stats = {
        "1": {
            "tokens_per_expert": torch.tensor([6, 2, 0, 0]),
            "entropy": torch.tensor(4.0),
            "balance_loss": torch.tensor(6.0),
        },
        "2": {
            "tokens_per_expert": torch.tensor([2, 2, 2, 2]),
            "entropy": torch.tensor(5.0),
            "balance_loss": torch.tensor(4.0),
        },
    }
    health = router_health(stats, tokens=4)
    assert health["layers"]["1"] == {
        "tokens_per_expert": [6, 2, 0, 0],
        "load_max_mean": 3.0,
        "dead_experts": 2,
        "entropy": 1.0,
        "balance_loss": 1.5,
    }
    assert health["layers"]["2"]["load_max_mean"] == 1.0
    layers = health.pop("layers")
    assert list(layers) == ["1", "2"]
    assert health == {"load_max_mean": 3.0, "dead_experts": 2, "entropy_min": 1.0, "balance_loss": 1.25}
    json.dumps(layers)


def test_router_health_takes_sums_it_has_not_heard_of_and_layers_that_differ():
    stats = {
        "0": {"tokens_per_expert": torch.tensor([1, 1])},
        "1": {"tokens_per_expert": torch.tensor([0, 0]), "commitment_loss": 3.0},
    }
    health = router_health(stats, tokens=2)
    assert health["commitment_loss"] == 1.5
    assert "entropy_min" not in health
    assert health["layers"]["1"]["load_max_mean"] == 0.0
    assert health["dead_experts"] == 2


def test_a_dense_model_has_no_router_health():
    assert router_health({}, tokens=8) == {}


# --- throughput ------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> None:
        self.now += seconds


def test_throughput_leaves_out_pauses_and_in_the_average_the_first_step():
    clock = Clock()
    flops = Flops(attention=10, experts=0, shared_experts=0, dense=0, router=0, head=0, attention_core=40)
    meter = Throughput(flops, rate=100_000.0, clock=clock)
    assert meter.row() == {}
    clock.after(8.0)
    meter.step(100)
    assert meter.average() == {}
    clock.after(2.0)
    meter.step(100)
    row = meter.row()
    assert row == pytest.approx(
        {"tokens_per_second": 20.0, "step_seconds": 5.0, "mfu": 20 * 80 / 1e5, "mfu_full": 20 * 100 / 1e5}
    )
    assert meter.row() == {}

    with meter.pause():
        clock.after(1000.0)
    clock.after(1.0)
    meter.step(100)
    clock.after(1.0)
    with contextlib.suppress(RuntimeError), meter.pause():
        clock.after(1000.0)
        raise RuntimeError("an evaluation that fails")
    clock.after(2.0)
    meter.step(100)
    assert meter.row()["tokens_per_second"] == pytest.approx(200 / 4)
    assert meter.average()["tokens_per_second"] == pytest.approx(300 / 6)
    assert meter.average()["step_seconds"] == pytest.approx(2.0)


# --- TensorBoard -----------------------------------------------------------------------------------------------------------------


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_the_values(tmp_path):
    stats = {"3": {"tokens_per_expert": torch.tensor([3, 1]), "entropy": 2.0}}
    with RunLog(tmp_path, 10, live=False) as log:
        log.train(1, {"loss": 2.5, **router_health(stats, 4)})
        log.train(2, {"loss": 1.5, **router_health(stats, 4)})
        log.evaluation(2, "valid", {"loss": 1.25, "bits_per_byte": 1.75})
    assert scalars(tmp_path, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert scalars(tmp_path, "valid/bits_per_byte") == [(2, 1.75)]
    assert scalars(tmp_path, "load_max_mean/layer_03") == [(1, 1.5), (2, 1.5)]
    assert scalars(tmp_path, "train/entropy_min") == [(1, 0.5), (2, 0.5)]


def test_tensorboard_hides_the_steps_that_are_repeated(tmp_path):
    train_steps(tmp_path, range(1, 8))
    train_steps(tmp_path, range(6, 9), start=5)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]


# --- the terminal ----------------------------------------------------------------------------------------------------------------

ROW = {
    "loss": 2.34567,
    "tokens_per_second": 18234.0,
    "mfu": 0.341,
    "mfu_full": 0.41,
    "lr": 3e-3,
    "grad_norm": 0.8123,
    "load_max_mean": 1.731,
    "entropy_min": 1.9,
    "dead_experts": 2,
}


def test_plain_lines_say_what_matters(tmp_path, capsys):
    with RunLog(tmp_path, 1000) as log:
        log.train(10, ROW)
        log.train(20, ROW)
        log.evaluation(20, "valid", {"loss": 1.5, "bits_per_byte": 2.1, "perplexity": 4.48})
    first, second, third = capsys.readouterr().out.splitlines()
    shown = "loss 2.3457  18.2k tok/s  MFU 34.1% causal  41.0% full  lr 3.00e-03  grad 0.812  load 1.73  entropy 1.90  dead 2"
    assert first == f"step   10/1000  {shown}"
    assert re.fullmatch(rf"step   20/1000  {re.escape(shown)}  ETA \d+:\d\d", second)
    assert third == "step 20  valid  loss 1.5000 nats  2.1000 bits per byte  perplexity 4.48"


def test_log_files_get_no_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunLog(tmp_path, 1000) as log:
        log.train(10, ROW)
        log.tick(11)
        log.say("sampled: \x1b[31mred\x1b[0m \x07 caf\u00e9 [bold]x[/bold]\nnext line")
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    assert out.endswith("sampled: \\x1b[31mred\\x1b[0m \\x07 caf\u00e9 [bold]x[/bold]\nnext line\n")


def test_messages_fit_an_ascii_stdout(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with RunLog(tmp_path, 10) as log:
        log.say("caf\u00e9")
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_terminal_gets_a_live_line_with_messages_above(tmp_path, monkeypatch):
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with monkeypatch.context() as patch, open(slave, "w") as terminal:
        patch.setattr(sys, "stdout", terminal)
        with RunLog(tmp_path, 40) as log:
            log.train(10, {"loss": 2.5, "lr": 1e-3})
            log.tick(11)
            log.say("a message")
            print("a stray print")
    with open(master, "rb", buffering=0) as screen:
        text = screen.read(65536).decode()
    assert "\x1b[" in text
    assert "a stray print" in text
    after = text[text.index("a message") :]
    assert "step 11/40" in after
    assert "ETA" in after
    assert "loss 2.5000" in after
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
