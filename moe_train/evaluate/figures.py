"""What a model's losses come to: nats, perplexities and bits, over counts of tokens, bytes, characters, words and lines.

Counts are those of the targets, the tokens that are predicted. The first token of a document, which nothing comes before, is none.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.data.tokenizer import Tokenizer
from moe_train.engine.base import Scored, Sums

_SPACE = b" \t\n\r\v\f"  # what bytes.split takes for white space
COLUMNS = ("nats", "tokens", "bytes", "characters", "words", "lines")


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text behind each id, int64 [vocabulary]."""
    return torch.from_numpy(tokenizer.byte_lengths())


def report(sums: Sums) -> dict[str, float]:
    """Mean nats per token, perplexity per token, and bits per byte of text."""
    nats = sums.nats / max(sums.targets, 1)
    return {
        "loss": nats,
        "perplexity": _exp(nats),
        "bits_per_byte": sums.nats / math.log(2) / max(sums.bytes, 1),
        "tokens": sums.targets,
        "bytes": sums.bytes,
    }


@dataclass(frozen=True)
class TextCounts:
    """What each id adds to the counts of a text, [vocabulary] each, and what depends on the id before it.

    A character counts at its first byte in UTF-8, a word (as `bytes.split` finds them) at its first byte, a line at its `\\n`; the end
    of a document ends a line, too, unless a `\\n` has just done so.
    """

    own: Tensor  # [vocabulary, 4] int64: bytes, characters, words that start after a space inside of it, `\n`
    starts_word: Tensor  # bool: its first byte is of a word, which starts here if the id before ends one
    ends_word: Tensor  # bool: its last byte is white space, or it has no text
    ends_line: Tensor  # bool: its last byte is `\n`
    is_end: Tensor  # bool: the end of a document, where that has no text of its own

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TextCounts":
        """Those of a tokenizer's ids."""
        pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        own = [(len(p), _characters(p), len(p.split()) - _begins(p), p.count(b"\n")) for p in pieces]
        is_end = torch.zeros(len(pieces), dtype=torch.bool)
        is_end[tokenizer.eod] = not pieces[tokenizer.eod]
        return cls(
            own=torch.tensor(own, dtype=torch.int64),
            starts_word=torch.tensor([_begins(p) for p in pieces]),
            ends_word=torch.tensor([not p or p[-1] in _SPACE for p in pieces]),
            ends_line=torch.tensor([p.endswith(b"\n") for p in pieces]),
            is_end=is_end,
        )

    def count(self, before: Tensor, targets: Tensor) -> Tensor:
        """Bytes, characters, words and lines, int64 [n, 4], of `targets` [n], which follow the ids `before` [n]."""
        counts = self.own[targets]
        counts[:, 2] += self.starts_word[targets] & self.ends_word[before]
        counts[:, 3] += self.is_end[targets] & ~self.ends_line[before]
        return counts


def tally(scored: Iterable[Scored], counts: TextCounts, labels: int, device: torch.device) -> Tensor:
    """Sums over all ranks, float64 [labels, 6], with the columns COLUMNS."""
    sums = torch.zeros(labels, len(COLUMNS), dtype=torch.float64)
    for some in scored:
        tokens = torch.ones_like(some.nats, dtype=torch.float64)[:, None]
        rows = torch.cat([some.nats.double()[:, None], tokens, counts.count(some.before, some.targets).double()], 1)
        sums.index_add_(0, some.labels, rows)
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()


def figures(sums: Tensor) -> dict[str, float]:
    """Everything that papers report of sums [6]: see docs/evaluation.md for what is divided by what."""
    nats, tokens, size, characters, words, lines = sums.tolist()
    bits = nats / math.log(2)
    return {
        **report(Sums(nats, int(tokens), int(size))),
        "bits_per_character": bits / max(characters, 1),
        "word_perplexity": _exp(nats / max(words, 1)),
        "word_and_line_perplexity": _exp(nats / max(words + lines, 1)),
        "nats": nats,
        "characters": int(characters),
        "words": int(words),
        "lines": int(lines),
    }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _begins(piece: bytes) -> bool:
    return bool(piece) and piece[0] not in _SPACE


def _characters(piece: bytes) -> int:
    raw = np.frombuffer(piece, dtype=np.uint8)
    return int(((raw & 0xC0) != 0x80).sum())  # the other bytes of a character are 10xxxxxx
