"""A model on held-out text: prepared corpora and files, all tokens once, under any layout."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.data.indexed import beside
from moe_train.data.inputs import Inputs
from moe_train.data.loader import EvalRows
from moe_train.data.prepare import prepare
from moe_train.errors import UserError
from moe_train.evaluate.figures import TextCounts, figures, tally
from moe_train.evaluate.memory import check_memory
from moe_train.evaluate.opening import Restored
from moe_train.model.transformer_xl import Memory
from moe_train.parallel.mesh import data_place


@dataclass(frozen=True)
class Reading:
    """How text is read and cut into rows."""

    stride: int | None = None  # tokens that a row predicts, from all before them in it; None = a row's all
    memory: int = 0  # hidden rows of each layer that a row sees of the rows before (segment-level recurrence)
    field: str = "text"  # of a JSON line
    label_field: str | None = None
    lines: bool = False  # each line of a text file is a document

    def check(self, restored: Restored, ranks: int) -> None:
        """Raise UserError where the model cannot be evaluated so."""
        seq_len = restored.config.train.seq_len
        if self.stride is not None and not 1 <= self.stride <= seq_len:
            raise UserError(f"--stride={self.stride}: must be from 1 to train.seq_len={seq_len}; a row cannot predict more")
        if self.stride is not None and self.memory:
            raise UserError(
                f"--stride={self.stride}: rows with --memory={self.memory} see what is before them; give one of the two"
            )
        if self.memory:
            check_memory(restored.config, ranks)


def evaluate_text(restored: Restored, data: str, reading: Reading, scratch: Path) -> dict[str, Any]:
    """All figures, and with labels those of each, on a prepared corpus (its prefix) or a file, which is encoded into `scratch`.

    Raises UserError for data that cannot be read and for a reading that the model cannot do.
    """
    config, world, model = restored.config, restored.world, restored.model
    rank, size = data_place(config.parallel, world)
    reading.check(restored, size)
    rows = EvalRows(
        find_corpus(restored, data, reading, scratch),
        seq_len=config.train.seq_len,
        micro_batch_size=1 if reading.memory else config.train.micro_batch_size,
        dp_rank=rank,
        dp_size=size,
        vocab_size=config.model.vocab_size,
        tokenizer=restored.tokenizer,
        stride=reading.stride,
    )
    memories = [Memory.start(1, reading.memory, world.device)] if reading.memory else []
    sums = tally(model.score(rows, memories), TextCounts.of(restored.tokenizer), len(rows.label_names), world.device)
    found: dict[str, Any] = figures(sums.sum(0))
    labels = {name: figures(row) for name, row in zip(rows.label_names, sums, strict=True) if row[1]}
    return found | ({"labels": labels} if len(rows.label_names) > 1 else {})


def find_corpus(restored: Restored, data: str, reading: Reading, scratch: Path) -> str:
    """The prefix of the corpus that `data` names, or of what is made of a file or folder in `scratch`."""
    if os.path.exists(beside(data, ".idx")):
        return data
    if not os.path.exists(data):
        raise UserError(f"{data}: neither a prepared corpus (no {beside(data, '.idx')}) nor a file or folder; check the path")
    inputs = Inputs([data], reading.field, reading.label_field, lines=reading.lines)
    prepare(inputs, scratch / "text", restored.tokenizer)
    return str(scratch / "text")
