"""launch/benchmark_checkpoint.py: what a row says, and that it leaves nothing behind."""

import json
from pathlib import Path

from launches import launch

WORDS = [
    "configs/benchmark_checkpoint.yaml",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_experts=4",
    "model.ffn_hidden_size=16",
    "train.seq_len=16",
    "train.device=cpu",
]


def test_a_row(tmp_path: Path) -> None:
    folder, output = tmp_path / "here", tmp_path / "rows.jsonl"
    words = [*WORDS, "--folder", str(folder), "--repeats", "2", "--steps", "2", "--output", str(output)]
    done = launch("benchmark_checkpoint", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, output.read_text().splitlines())
    assert not list(folder.iterdir())
    assert row["ranks"] == 2
    assert 2.9 * row["model_bytes"] < row["checkpoint_bytes"]  # two moments, and what the format adds
    for what in ("save", "write", "load", "read"):
        assert len(row[f"{what}_seconds"]) == 2
        middle = sum(row[f"{what}_seconds"]) / 2
        assert abs(row[f"{what}_bytes_per_second"] * middle / row["checkpoint_bytes"] - 1) < 1e-6
    assert row["stall_seconds"] > 0
    assert row["stall_steps"] == row["stall_seconds"] / row["step_seconds"]
    assert f"= {row['stall_steps']:.2f} steps" in done.stdout


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = launch("benchmark_checkpoint", *WORDS, "--folder", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (tmp_path / "mine").read_text() == "mine"
