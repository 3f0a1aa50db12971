"""Examples as arrays: what a model sees and what it is to predict. All of them are in memory, 8 bytes for each token."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_train.data.stream import NO_TARGET
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.finetune.records import Paths, files_of, read_records
from moe_train.finetune.templates import parts_of

Int32s = npt.NDArray[np.int32]
TooLong = Literal["truncate", "skip", "error"]
Empty = Literal["error", "skip", "keep"]


class Example(NamedTuple):
    """One document."""

    where: str  # file and entry, for people
    tokens: Int32s  # [n]
    targets: Int32s  # [n], NO_TARGET where nothing is learned


@dataclass(frozen=True)
class Examples:
    """Documents behind each other; the i-th is [starts[i], starts[i + 1])."""

    tokens: Int32s  # [N]
    targets: Int32s  # [N]
    starts: npt.NDArray[np.int64]  # [n + 1]
    told: str  # how many there are, and what became of the others

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each, [n]."""
        return np.diff(self.starts)

    @cached_property
    def target_counts(self) -> npt.NDArray[np.int64]:
        """Targets of each, [n]."""
        counts: npt.NDArray[np.int64] = np.add.reduceat(self.targets != NO_TARGET, self.starts[:-1], dtype=np.int64)
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all of it, but for the names of files."""
        found = hashlib.sha256()
        for values in (self.tokens, self.targets, self.starts):
            found.update(values.astype(values.dtype.newbyteorder("<"), copy=False).data)
        return f"sha256-{found.hexdigest()}"


Cut = Callable[[Example, int], Example]


def first_part(example: Example, size: int) -> Example:
    """What is left of an example when it is cut after `size` tokens."""
    return example._replace(tokens=example.tokens[:size], targets=example.targets[:size])


def gather(
    examples: Iterable[Example], counts: Counter[str], paths: Paths, seq_len: int, too_long: TooLong, cut: Cut
) -> Examples:
    """Examples of at most `seq_len` tokens each, with a target at least; `counts` of those that are not there as they were are said.

    Raises UserError where none is left, or one is refused.
    """
    tokens, targets, starts = array("i"), array("i"), array("q", [0])  # which grow in place
    for example in examples:
        if len(example.tokens) > seq_len:
            if too_long == "error":
                rule = f"{len(example.tokens)} tokens are more than train.seq_len={seq_len}"
                raise UserError(f"{example.where}: {rule}; raise it, or set sft.too_long to truncate or skip")
            counts["too long"] += 1
            if too_long == "skip":
                continue
            example = cut(example, seq_len)
            if (example.targets == NO_TARGET).all():
                counts["prompts alone"] += 1
                continue
        tokens.frombytes(example.tokens.tobytes())
        targets.frombytes(example.targets.tobytes())
        starts.append(len(tokens))
    if not tokens:
        raise UserError(
            f"{_names(paths)}: no example is left ({_told(counts, seq_len, too_long) or 'there was none'}); give others"
        )
    told = ", ".join([f"{_names(paths)}: {len(starts) - 1} examples", *filter(None, [_told(counts, seq_len, too_long)])])
    return Examples(np.frombuffer(tokens, np.int32), np.frombuffer(targets, np.int32), np.frombuffer(starts, np.int64), told)


def _told(counts: Counter[str], seq_len: int, too_long: TooLong) -> str:
    """What became of examples that are not there as they were."""
    became = "skipped" if too_long == "skip" else "truncated"
    shown = {
        "too long": f"longer than {seq_len} tokens {became}",
        "prompts alone": "of them left out, as no response was left",
        "empty": "with an empty response skipped",
    }
    return ", ".join(f"{counts[name]} {text}" for name, text in shown.items() if counts[name])


def _names(paths: Paths) -> str:
    return paths if isinstance(paths, str) else ", ".join(paths)


def read_instructions(paths: Paths, tokenizer: Tokenizer, empty: Empty, counts: Counter[str]) -> Iterator[Example]:
    """Instructions and chats. Raises UserError naming the file, the entry and the field that is wrong."""
    for path in files_of(paths):
        for where, record in read_records(path):
            parts = parts_of(record, where)
            if empty != "keep" and any(part.learned and not part.text.strip() for part in parts):
                if empty == "skip":
                    counts["empty"] += 1
                    continue
                field = "content" if "messages" in record else "output"
                raise UserError(f"{where}: field {field!r} of a response is empty; set sft.empty_response to skip or keep")
            pieces = [encode(part.text, tokenizer, where, end=part.learned) for part in parts]
            ids = np.concatenate(pieces)
            learned = np.repeat([part.learned for part in parts], [len(piece) for piece in pieces])
            yield Example(where, ids[:-1], np.where(learned[1:], ids[1:], NO_TARGET).astype(np.int32))


def encode(text: str, tokenizer: Tokenizer, where: str, end: bool) -> Int32s:
    """Ids of a text, and with `end` the end of the document after it. Raises UserError where a text has no ids."""
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return np.append(ids, tokenizer.eod).astype(np.int32) if end else ids.astype(np.int32)
