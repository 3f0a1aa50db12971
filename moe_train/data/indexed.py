"""Memory-mapped datasets of token documents in the format of Megatron-LM's MMapIndexedDataset.

PREFIX.bin holds the tokens of all sequences, one after the other, and nothing else. PREFIX.idx, all little-endian:

    bytes  content
    9      b"MMIDIDX\\x00\\x00"
    8      version, 1
    1      code of the token type (DTYPES)
    8      n, number of sequences
    8      m, number of document boundaries: documents + 1
    4 n    int32 length of each sequence, in tokens
    8 n    int64 offset of each sequence in PREFIX.bin, in bytes
    8 m    int64 first sequence of each document, and n at the end

Ours have one sequence per document; Megatron's may have several. Beside them we keep PREFIX.json (sidecar.py) and PREFIX.labels
(one little-endian int32 per document); without these all labels are 0 and the tokenizer is unknown.

Opening costs the same for any size: lengths, header, both ends and windows spread over the index are checked at once (all of a
small index), and every other entry where it is used. A file that was damaged later raises UserError then.
"""

import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from moe_train.data.sidecar import UNKNOWN_LABEL, read_sidecar
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moe_train.errors import UserError

Int64s = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    c: np.dtype(t) for c, t in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
UNREADABLE_DTYPES = {6: "float64", 7: "float32"}
UINT16_VOCABULARY = 65500  # below this Megatron writes uint16, from here on int32

_WINDOWS, _WINDOW = 64, 4096  # index entries that are checked on opening
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file, in the fingerprint


def beside(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """Return PREFIX + suffix; a prefix that was given as PREFIX.bin or PREFIX.idx is understood."""
    text = os.fspath(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + suffix)


class IndexedDataset:
    """Documents of token ids under one prefix, mapped into memory.

    `vocab_size` is the model's and `tokenizer` the run's, where they are known: the dataset must have been made with that
    tokenizer (or say nothing about it), and ids that are read must be in all vocabularies.

    Raises UserError, when it is opened or read, for files that are missing, truncated, damaged or not of this format.
    """

    def __init__(
        self, prefix: str | os.PathLike[str], vocab_size: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.prefix = beside(prefix, "")
        self._index = self._map(".idx")
        self._read_header()
        self._check_ends()
        self._tokens = self._map(".bin").view(self.dtype)
        self.num_tokens = len(self._tokens)
        self.sidecar = read_sidecar(beside(self.prefix, ".json"))
        self._check_sidecar()
        self._check_windows()
        self._id_limit = self._vocabulary(vocab_size, tokenizer)
        self._labels = self._read_labels()

    # Opening

    def _damaged(self, suffix: str, problem: str) -> NoReturn:
        raise UserError(f"dataset {self.prefix}{suffix} is damaged: {problem}; prepare or copy it again")

    def _file_size(self, suffix: str) -> int:
        path = beside(self.prefix, suffix)
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise UserError(
                f"dataset file {path} does not exist; a dataset is named by its path without .bin or .idx"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"dataset file {path}: {error}") from None

    def _map(self, suffix: str) -> npt.NDArray[np.uint8]:
        path = beside(self.prefix, suffix)
        if self._file_size(suffix) == 0:
            return np.empty(0, dtype=np.uint8)  # which the system refuses to map
        try:
            # As a plain array: slicing a memmap object takes ten times as long.
            return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        except OSError as error:
            raise UserError(f"dataset file {path}: {error.strerror}") from None

    def _read_header(self) -> None:
        size = len(self._index)
        if size < HEADER.size:
            self._damaged(".idx", f"{size} bytes are fewer than its header of {HEADER.size}")
        magic, version, code, self.num_sequences, boundaries = HEADER.unpack(self._index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"dataset {self.prefix}.idx is no Megatron index: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise UserError(f"dataset {self.prefix}.idx has version {version}; this code reads version {VERSION}")
        if code in UNREADABLE_DTYPES:
            raise UserError(f"dataset {self.prefix}.idx holds {UNREADABLE_DTYPES[code]}; token ids must be integers")
        if code not in DTYPES:
            self._damaged(".idx", f"type code {code} is not one of {', '.join(map(str, DTYPES))}")
        self.dtype = DTYPES[code]
        n = self.num_sequences
        expected = HEADER.size + 12 * n + 8 * boundaries
        if size == expected + n and n:
            raise UserError(f"dataset {self.prefix}.idx is multimodal (it has a mode per sequence); only text can be read")
        if size != expected or not boundaries:
            self._damaged(".idx", f"{size} bytes, where {n} sequences and {boundaries} boundaries need {expected}")
        self.num_documents = boundaries - 1
        self._sizes = self._view("<i4", n, HEADER.size)
        self._offsets = self._view("<i8", n, HEADER.size + 4 * n)
        self._boundaries = self._view("<i8", boundaries, HEADER.size + 12 * n)

    def _view(self, dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
        return np.ndarray((count,), dtype=dtype, buffer=self._index, offset=offset)

    def _check_ends(self) -> None:
        bin_bytes = self._file_size(".bin")
        n, width = self.num_sequences, self.dtype.itemsize
        end = int(self._offsets[-1]) + int(self._sizes[-1]) * width if n else 0
        if end != bin_bytes:
            self._damaged(".bin", f"it has {bin_bytes} bytes, its index ends at byte {end}")
        if bin_bytes % width:
            self._damaged(".bin", f"its {bin_bytes} bytes are no whole number of tokens of {width} bytes")
        if n and self._offsets[0] != 0:
            self._damaged(".idx", f"the first sequence starts at byte {self._offsets[0]}, not 0")
        if self._boundaries[0] != 0 or self._boundaries[-1] != n:
            found = f"{self._boundaries[0]} to {self._boundaries[-1]}"
            self._damaged(".idx", f"its documents go from sequence {found}, not from 0 to {n}")

    def _check_windows(self) -> None:
        self._all_checked = max(self.num_sequences, len(self._boundaries)) <= _WINDOWS * _WINDOW
        for start in _window_starts(self.num_sequences):
            self._check_sequences(start, min(start + _WINDOW, self.num_sequences))
        for start in _window_starts(len(self._boundaries)):
            window = self._boundaries[start : start + _WINDOW + 1]
            if (np.diff(window) < 0).any() or window[0] < 0 or window[-1] > self.num_sequences:
                self._damaged(".idx", f"document boundaries after {start} do not rise")
            if self.sidecar is not None and (window != np.arange(start, start + len(window))).any():
                self._damaged(".idx", f"document boundaries after {start} are not one per sequence, as ours are")

    def _check_sequences(self, first: int, last: int) -> None:
        """Check that sequences [first, last) have no negative length and lie one behind the other."""
        sizes = self._sizes[first:last].astype(np.int64)
        offsets = self._offsets[first : last + 1].astype(np.int64)
        if (sizes < 0).any():
            self._damaged(".idx", f"a sequence after {first} has a negative length")
        gaps = np.diff(offsets) - sizes[: len(offsets) - 1] * self.dtype.itemsize
        if gaps.any():
            self._damaged(".idx", f"sequence {first + int(gaps.nonzero()[0][0])} does not end where the next one starts")

    def _check_sidecar(self) -> None:
        if self.sidecar is None:
            return
        found, said = (self.num_documents, self.num_tokens), (self.sidecar.num_documents, self.sidecar.num_tokens)
        if found != said or self.num_sequences != self.num_documents:
            raise UserError(
                f"dataset {self.prefix} has {found[0]} documents, {self.num_sequences} sequences and {found[1]} tokens, but "
                f"{self.prefix}.json says {said[0]}, {said[0]} and {said[1]}; the files are of different datasets: "
                "prepare or copy them again"
            )

    def _vocabulary(self, model: int | None, tokenizer: Tokenizer | None) -> int:
        """Return the number of ids that may occur, after comparing what is known of them."""
        mine = self.sidecar.vocab_size if self.sidecar else None
        if self.sidecar and tokenizer and self.sidecar.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"dataset {self.prefix} was prepared with tokenizer {self.sidecar.tokenizer} ({self.sidecar.fingerprint}), the "
                f"run has {tokenizer.name} ({tokenizer.fingerprint}); set data.tokenizer, or prepare the data again"
            )
        if mine is not None and model is not None and mine > model:
            raise UserError(
                f"dataset {self.prefix} has a vocabulary of {mine} ids, the model of {model}; "
                f"set model.vocab_size to at least {mine}"
            )
        known = (mine, model, tokenizer.vocab_size if tokenizer else None)
        return min((size for size in known if size is not None), default=2**63 - 1)

    def _read_labels(self) -> npt.NDArray[np.int32] | None:
        if self.sidecar is None:
            return None
        if (size := self._file_size(".labels")) != 4 * self.num_documents:
            self._damaged(".labels", f"{size} bytes for {self.num_documents} documents of 4 bytes each")
        return self._map(".labels").view("<i4")

    # Reading

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.num_documents

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of labels 0, 1, ...; ("unknown",) without a sidecar."""
        return self.sidecar.label_names if self.sidecar else (UNKNOWN_LABEL,)

    def start(self, document: int) -> int:
        """Return where a document starts, in tokens; `start(len(self))` is the number of tokens."""
        sequence = int(self._boundaries[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences or (self.sidecar is not None and sequence != document):
            self._damaged(".idx", f"document {document} starts at sequence {sequence} of {self.num_sequences}")
        offset = int(self._offsets[sequence])
        if offset % self.dtype.itemsize or not 0 <= offset <= self.num_tokens * self.dtype.itemsize:
            self._damaged(".idx", f"sequence {sequence} starts at byte {offset}, inside a token or outside the file")
        return offset // self.dtype.itemsize

    def read(self, start: int, stop: int) -> Int64s:
        """Return the tokens at positions [start, stop) of all documents behind each other, int64 [stop - start].

        Raises UserError for an id outside the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens}")
        ids = self._tokens[start:stop].astype(np.int64)
        # As uint64, a negative id is a large one.
        if ids.size and ids.view(np.uint64).max() >= self._id_limit:
            at = int(ids.view(np.uint64).argmax())
            raise UserError(
                f"dataset {self.prefix}.bin has id {ids[at]} at token {start + at}, outside a vocabulary of {self._id_limit}; "
                "it was prepared with another tokenizer, or is damaged"
            )
        return ids

    def document(self, i: int) -> Int64s:
        """Return all tokens of document i, int64 [length]."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        start, stop = self.start(i), self.start(i + 1)
        if start > stop:
            self._damaged(".idx", f"document {i} ends before it starts")
        return self.read(start, stop)

    def documents_in(self, start: int, stop: int) -> tuple[Int64s, Int64s]:
        """Find the documents that have a token in [start, stop), by binary search.

        Returns where they start (int64 [k + 1]: the last entry is the end of the last one) and their labels (int64 [k]). The
        first one may start before `start`. Empty documents are left out.
        """
        everything = range(self.num_documents + 1)
        first = bisect_right(everything, start, key=self.start) - 1
        last = bisect_left(everything, stop, lo=max(first, 0) + 1, key=self.start)
        if not 0 <= first < last <= self.num_documents:
            self._damaged(".idx", f"no documents lie at tokens {start} to {stop}")
        if not self._all_checked:
            self._check_sequences(int(self._boundaries[first]), int(self._boundaries[last]))
        starts = np.array([self.start(d) for d in range(first, last + 1)], dtype=np.int64)
        lengths = starts[1:] - starts[:-1]
        shortest = lengths.min()
        if shortest < 0 or starts[0] > start or starts[-1] < stop:
            self._damaged(".idx", f"documents {first} to {last} do not cover tokens {start} to {stop}")
        labels = self._labels_of(first, last)
        if shortest > 0:
            return starts, labels
        kept = lengths > 0
        return np.append(starts[:-1][kept], starts[-1]), labels[kept]

    def count_ends(self, start: int, stop: int) -> int:
        """Return how many documents have their last token in [start, stop), start < stop."""
        everything = range(self.num_documents + 1)
        first = bisect_right(everything, start, key=self.start)
        last = bisect_right(everything, stop, lo=first, key=self.start)
        # Each end is the start of the next document; empty documents start there too.
        return len({self.start(d) for d in range(first, last)})

    def lengths(self) -> Int64s:
        """Return the tokens of each document, int64 [documents]."""
        ends = np.append(self._offsets, self.num_tokens * self.dtype.itemsize)[self._boundaries]
        return np.diff(ends) // self.dtype.itemsize

    def labels(self) -> Int64s:
        """Return the label of each document, int64 [documents]."""
        return self._labels_of(0, self.num_documents)

    def label(self, document: int) -> int:
        """Return the label of a document, 0 where there are no labels."""
        return int(self._labels_of(document, document + 1)[0])

    def _labels_of(self, first: int, last: int) -> Int64s:
        if self._labels is None:
            return np.zeros(last - first, dtype=np.int64)
        labels = self._labels[first:last].astype(np.int64)
        if labels.size and (labels.min() < 0 or labels.max() >= len(self.label_names)):
            self._damaged(".labels", f"a label of documents {first} to {last - 1} is outside 0 to {len(self.label_names) - 1}")
        return labels

    @cached_property
    def fingerprint(self) -> str:
        """A hash of lengths and of samples of each file: tells datasets apart in a time that does not grow with them."""
        digest = hashlib.sha256()
        for content in (self._index, self._tokens.view(np.uint8), self._labels):
            content = np.empty(0, np.uint8) if content is None else content.view(np.uint8)
            digest.update(len(content).to_bytes(8, "little"))
            for start in np.linspace(0, max(len(content) - _SAMPLE_BYTES, 0), _SAMPLES).astype(np.int64):
                digest.update(content[start : start + _SAMPLE_BYTES].tobytes())
        return digest.hexdigest()


def _window_starts(count: int) -> list[int]:
    """Return where to check `count` entries: all of them, or _WINDOWS windows from the first to the last."""
    windows = min(_WINDOWS, -(-count // _WINDOW))
    return [int(start) for start in np.linspace(0, max(count - _WINDOW, 0), windows)]


def load_dataset_tokenizer(prefix: str | os.PathLike[str]) -> Tokenizer | None:
    """Return the tokenizer that made a dataset, or None when it has no sidecar.

    Raises UserError when the tokenizer's file is missing, or is not the one that the sidecar was written for.
    """
    path = beside(prefix, ".json")
    sidecar = read_sidecar(path)
    if sidecar is None:
        return None
    file = sidecar.tokenizer_file
    if file is None and sidecar.tokenizer != ByteTokenizer.name:
        raise UserError(
            f"dataset sidecar {path}: tokenizer {sidecar.tokenizer!r} needs a tokenizer_file; only {ByteTokenizer.name!r} has none; "
            "prepare the data again"
        )
    tokenizer = load_tokenizer(path.parent / file if file is not None else ByteTokenizer.name)
    if tokenizer.fingerprint != sidecar.fingerprint:
        raise UserError(
            f"dataset {path} was made with tokenizer {sidecar.fingerprint}, but {file or sidecar.tokenizer} is "
            f"{tokenizer.fingerprint}; copy the right file, or prepare the data again"
        )
    return tokenizer
