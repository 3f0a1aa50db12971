"""Small instruction files and models for tests of fine-tuning."""

import json
import random
from pathlib import Path
from typing import Any


def copies(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Instructions to copy a word."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdef", k=rng.randint(2, 6))) for _ in range(count)]
    return [{"instruction": "Copy.", "input": word, "output": word} for word in words]


def write_examples(path: Path, examples: list[Any]) -> str:
    """Write `.json` or `.jsonl`; returns the path."""
    lines = "".join(json.dumps(one) + "\n" for one in examples)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(examples))
    return str(path)


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short chats that ask for the same letters again."""
    messages = [
        [{"role": "user", "content": one["input"]}, {"role": "assistant", "content": one["output"]}]
        for one in copies(count, seed)
    ]
    return [{"messages": pair} for pair in messages]
