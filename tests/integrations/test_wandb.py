"""Weights & Biases gets the rows of metrics.jsonl, offline and without the environment."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_train.config.faults import MonitorSection
from moe_train.metrics import RunLog, read_rows

pytestmark = pytest.mark.integration
SECRET = "hf_Q7mB1x9secret"


def records(log: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in them pieces with checksum, length and kind, after 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no room for a header: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def test_offline_files_hold_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "5" * 40)
    monitor = MonitorSection(wandb="offline", wandb_project="tests")
    with RunLog(tmp_path / "run", 2, monitor=monitor, live=False) as log:
        log.train(1, {"loss": 3.5, "lr": 0.1, "layers": {"0": {"tokens_per_expert": [1, 2], "entropy": 0.5}}})
        log.train(2, {"loss": 2.5, "lr": 0.2})
        log.evaluation(2, "valid", {"loss": 2.25})
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    history = []
    for data in records(kept.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            history.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    written = [{key: float(value) for key, value in row.items() if "/" in key} for row in history]
    assert written[0] == {"train/loss": 3.5, "train/lr": 0.1, "entropy/layer_00": 0.5}
    assert written[1:] == [{"train/loss": 2.5, "train/lr": 0.2}, {"valid/loss": 2.25}]
    assert [row["loss"] for row in read_rows(tmp_path / "run")] == [3.5, 2.5, 2.25]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
            assert b"5" * 40 not in path.read_bytes()
