"""Datasets behind each other as one stream of tokens, and what a row cut from it looks like.

Shapes: S positions of a row.
"""

import glob
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from moe_train.data.indexed import IndexedDataset, Int64s, beside
from moe_train.data.sidecar import UNKNOWN_LABEL
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError

NO_TARGET = -100

Prefixes = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class TokenStream:
    """The tokens of one or more datasets, in the order of their prefixes. A prefix with `*`, `?` or `[` stands for all that match it.

    `sources` says which datasets each prefix stands for, as (first, last + 1).

    `vocab_size` is the model's and `tokenizer` the run's, for the checks of IndexedDataset. Raises UserError when a dataset
    cannot be read, does not fit them, or was made with another tokenizer than the rest; `key` is where its prefix stands.
    """

    def __init__(
        self, prefixes: Prefixes, vocab_size: int | None = None, tokenizer: Tokenizer | None = None, key: str | None = None
    ) -> None:
        names = [prefixes] if isinstance(prefixes, str | os.PathLike) else list(prefixes)
        if not names:
            raise UserError("no dataset was named; give at least one prefix of a .bin and .idx file")
        found: list[list[IndexedDataset]] = []
        for name in names:
            try:
                found.append([IndexedDataset(shard, vocab_size, tokenizer) for shard in _shards(name)])
            except UserError as error:
                raise (error if key is None else UserError(f"{key}={os.fspath(name)}: {error}")) from None
        self.datasets = list(chain.from_iterable(found))
        ends = list(accumulate(map(len, found)))
        self.sources = list(zip([0, *ends], ends, strict=False))
        self._starts = [0, *accumulate(d.num_tokens for d in self.datasets)]
        self.num_tokens = self._starts[-1]
        self.label_names = tuple(dict.fromkeys((UNKNOWN_LABEL, *(n for d in self.datasets for n in d.label_names))))
        numbers = {name: i for i, name in enumerate(self.label_names)}
        self._label_numbers = [np.array([numbers[n] for n in d.label_names], dtype=np.int64) for d in self.datasets]
        self._check_tokenizers()

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the tokens [start, stop) of the stream that datasets [first, last) have."""
        return self._starts[first], self._starts[last]

    def _check_tokenizers(self) -> None:
        tokenizers = {d.sidecar.fingerprint: d for d in self.datasets if d.sidecar is not None}
        if len(tokenizers) > 1:
            one, other = list(tokenizers.values())[:2]
            raise UserError(f"datasets {one.prefix} and {other.prefix} were made with different tokenizers; prepare one again")

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Split [start, stop) at the ends of datasets: (dataset, start, stop) within each, none of them empty."""
        pieces = []
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[i + 1])
            if start < end:
                pieces.append((i, start - self._starts[i], end - self._starts[i]))
            start = end
            i += 1
        return pieces

    def read(self, start: int, stop: int) -> Int64s:
        """Return the tokens at [start, stop) of the stream, int64. Raises UserError for an id outside the vocabulary."""
        return np.concatenate([self.datasets[i].read(a, b) for i, a, b in self._pieces(start, stop)])

    def segments(self, start: int, stop: int) -> tuple[Int64s, Int64s, bool]:
        """Return the documents that [start, stop) cuts from the stream, stop > start.

        Returns bounds [k + 1] from `start` to `stop`, between which each segment lies; the segments' labels [k]; and whether
        the last one's document ends at `stop` too.
        """
        # One token more shows whether a document starts at `stop`.
        beyond = min(stop + 1, self.num_tokens)
        starts, labels = [], []
        for i, a, b in self._pieces(start, beyond):
            found, found_labels = self.datasets[i].documents_in(a, b)
            starts.append(found[:-1] + self._starts[i])
            labels.append(self._label_numbers[i][found_labels])
        bounds = np.append(np.concatenate(starts), stop)
        bounds[0] = start
        if beyond == stop:
            return bounds, np.concatenate(labels), True
        if bounds[-2] == stop:
            return bounds[:-1], np.concatenate(labels)[:-1], True
        return bounds, np.concatenate(labels), False

    def count_targets(self, start: int, stop: int) -> int:
        """Return how many tokens at [start, stop) are followed by another one of their document; reads no tokens."""
        return stop - start - sum(self.datasets[i].count_ends(a, b) for i, a, b in self._pieces(start, stop))

    def fill_row(self, start: int, out: Int64s) -> None:
        """Write the row of S tokens from `start` to out, int64 [5, S]: tokens, targets, positions, doc_ids, labels.

        Where the stream has fewer than S tokens left, or none, the rest is padding: zeros without targets, as a document of
        their own.
        """
        size = out.shape[1]
        stop = min(start + size, self.num_tokens)
        count = max(stop - start, 0)
        segments = self._fill_real(start, stop, out[:, :count]) if count else 0
        if count < size:
            out[:, count:] = 0
            _, targets, positions, doc_ids, _ = out[:, count:]
            targets[:] = NO_TARGET
            positions[:] = np.arange(size - count)
            doc_ids[:] = segments

    def _fill_real(self, start: int, stop: int, out: Int64s) -> int:
        """Write the row without padding, out [5, stop - start], and return its number of segments."""
        tokens, targets, positions, doc_ids, labels = out
        bounds, segment_labels, ends = self.segments(start, stop)
        lengths = bounds[1:] - bounds[:-1]
        ids = self.read(start, min(stop + 1, self.num_tokens))
        tokens[:] = ids[: len(tokens)]
        targets[: len(ids) - 1] = ids[1:]
        targets[bounds[1:-1] - start - 1] = NO_TARGET
        if ends:
            targets[-1] = NO_TARGET
        positions[:] = np.arange(len(tokens)) - np.repeat(bounds[:-1] - start, lengths)
        doc_ids[:] = np.repeat(np.arange(len(lengths)), lengths)
        labels[:] = np.repeat(segment_labels, lengths)
        return len(lengths)


def _shards(prefix: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """Return the prefixes that a pattern matches, in the order of their names, or the prefix itself."""
    pattern = os.fspath(prefix)
    if not any(sign in pattern for sign in "*?[") or os.path.exists(beside(pattern, ".idx")):
        return [prefix]
    found = sorted(glob.glob(os.fspath(beside(pattern, ".idx"))))
    if not found:
        raise UserError(f"dataset {pattern}: no .idx file matches this pattern")
    return [name.removesuffix(".idx") for name in found]
