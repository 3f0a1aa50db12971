"""A run that takes a second: words for launch/pretrain.py, and what it leaves."""

import hashlib
import json
from pathlib import Path

MODEL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=4", "model.ffn_hidden_size=32"]
ROUTER = ["model.router.router_size=8"]
TRAIN = ["train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=4", "train.log_every=1", "train.steps=6"]
REST = ["checkpoint.every=2", "eval.every=3", "eval.max_rows=8", "sample.max_tokens=8", "optim.warmup_steps=2"]


def words_for(prefix: str) -> list[str]:
    """What follows `launch/pretrain.py`, but for run.dir; every split is the corpus at `prefix`."""
    data = [f"data.{split}={prefix}" for split in ("train", "valid", "test")]
    return ["configs/quickstart.yaml", *MODEL, *ROUTER, *TRAIN, *REST, *data, "data.tokenizer=bytes"]


def rows(folder: Path, kind: str = "train") -> list[dict]:
    """Rows of a kind in a run's metrics.jsonl."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def content(folder: Path) -> dict[str, str]:
    """The digest of every file below `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
