"""Small prepared corpora for tests."""

from pathlib import Path

import numpy as np

from moe_train.data.tokenizer import ByteTokenizer
from moe_train.data.writer import DatasetWriter


def write_corpus(prefix: Path, documents: int = 60, seed: int = 0) -> str:
    """Documents of 5 to 200 bytes of low-entropy text; returns the prefix."""
    rng = np.random.default_rng(seed)
    with DatasetWriter(prefix, ByteTokenizer()) as writer:
        for i in range(documents):
            words = rng.choice(["def ", "return ", "x", "y", " = ", "(", ")\n", "self."], size=int(rng.integers(2, 60)))
            writer.add_text("".join(words), label=("a", "b")[i % 2])
    return str(prefix)
