"""Writing datasets that `indexed.py` and Megatron-LM read."""

import contextlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from moe_train.data.indexed import DTYPES, HEADER, MAGIC, UINT16_VOCABULARY, VERSION, IndexedDataset, beside
from moe_train.data.sidecar import UNKNOWN_LABEL, Sidecar, is_sidecar
from moe_train.data.tokenizer import Ids, Tokenizer, utf8
from moe_train.errors import UserError
from moe_train.files import fsync_folder, temporary_beside

MAX_DOCUMENT = 2**31 - 1  # the format has int32 lengths
MAX_LABELS = 65536
_CHUNK = 1 << 20  # index entries that are written at a time
_COPIED = 1 << 20  # bytes that are copied at a time
_HELD = 1 << 16  # tokens that are held back, so that what numpy costs per call is paid for many documents at once

Place = Callable[[int], str]  # where the text of a number came from, for errors


class DatasetWriter:
    """Writes documents one by one to PREFIX.bin, .idx, .labels, .json and the tokenizer's file.

    A context manager: everything is written under temporary names and takes its final names when the block ends without an
    exception, PREFIX.idx last; otherwise nothing is left. Memory: 4 bytes per document. Equal documents give equal files.

    Raises UserError when PREFIX's files exist and are not a dataset of ours, which may be replaced.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        label_names: Sequence[str] = (),
        source: str | None = None,
        save_tokenizer: bool = True,
    ) -> None:
        """Prepare to write. `label_names` fixes the numbers of labels; others are added as they appear."""
        self.prefix = beside(prefix, "")
        self.tokenizer = tokenizer
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._source = source
        self._tokenizer_suffix = tokenizer.suffix if save_tokenizer else ""
        self._labels = {name: i for i, name in enumerate(dict.fromkeys((UNKNOWN_LABEL, *label_names)))}
        self._code = next(c for c, dtype in DTYPES.items() if dtype == _dtype_for(tokenizer.vocab_size))
        self._sizes = array("i")
        self._held = np.empty(_HELD, dtype=DTYPES[self._code])
        self._num_held = 0
        self._byte_lengths = tokenizer.byte_lengths()
        self._refuse_foreign_files()

    def _suffixes(self) -> list[str]:
        """Return the suffixes of all files in the order in which they appear.

        The sidecar is first, so that what a kill leaves is known to be ours; the index is last: a dataset is there when it is.
        """
        return [s for s in (".json", self._tokenizer_suffix, ".bin", ".labels", ".idx") if s]

    def _refuse_foreign_files(self) -> None:
        if is_sidecar(beside(self.prefix, ".json")):
            return
        for suffix in self._suffixes():
            if (path := beside(self.prefix, suffix)).exists():
                raise UserError(f"{path} exists and belongs to no dataset of ours; remove it or choose another output")

    def __enter__(self) -> Self:
        """Create the temporary files."""
        with contextlib.ExitStack() as stack:
            self._temporary = {}
            for suffix in self._suffixes():
                self._temporary[suffix] = temporary_beside(beside(self.prefix, suffix))
                stack.callback(self._temporary[suffix].unlink, missing_ok=True)
            self._bin = stack.enter_context(self._temporary[".bin"].open("wb"))
            self._label_file = stack.enter_context(self._temporary[".labels"].open("wb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the files their final names, or remove them after an exception."""
        with self._stack:
            if kind is None:
                self._finish()

    def add_text(
        self,
        text: str | bytes,
        label: str = UNKNOWN_LABEL,
        rest: Iterable[bytes] = (),
        place: Place | None = None,
    ) -> None:
        """Add a text, with the blocks of bytes that follow it, as one document: its ids and an end of document.

        As much of it is in memory as lies between two places where the tokenizer can cut. Raises UserError where the tokenizer has no
        ids for it, or it is too long, and names `place(0)`, which it came from.
        """
        held, lengths = utf8(text), list[int]()
        for block in rest:
            at = self.tokenizer.cut(held)
            lengths += self._encode([held[:at]] if at else [], place, end=False)
            held = held[at:] + block
        lengths += self._encode([held], place, end=True)
        self._end_documents([sum(lengths)], [label], place)

    def add_texts(self, texts: Sequence[bytes], labels: Sequence[str], place: Place | None = None) -> None:
        """Add texts as `add_text` does, in less time than one by one. Raises its errors, which name `place(i)` of the i-th text."""
        self._end_documents(self._encode(texts, place, end=True), labels, place)

    def _encode(self, texts: Sequence[bytes], place: Place | None, *, end: bool) -> list[int]:
        lengths: list[int] = []
        try:
            for text in texts:  # not in one call: SentencePiece hands lists to threads, which takes three times as long
                lengths.append(self._write(self.tokenizer.encode(text), end))
        except UserError as error:
            raise _at(place, len(lengths), error) from None
        return lengths

    def add(self, ids: Ids, label: str = UNKNOWN_LABEL) -> None:
        """Add one document of ids, [length] with length >= 1. Raises UserError when an id or the length is out of range."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.tokenizer.vocab_size):
            raise UserError(f"document {self.num_documents} has ids outside the {self.tokenizer.vocab_size} of its tokenizer")
        self._end_documents([self._write(ids)], [label])

    def _write(self, ids: Ids, end: bool = False) -> int:
        """Take the next ids, with the end of a document behind them or without it, and return how many."""
        start, count = self._num_held, len(ids)
        if start + count >= _HELD:
            self._flush()
            start = 0
            if count >= _HELD:
                self._put(ids)
                ids = ids[:0]
        stop = start + len(ids)
        self._held[start:stop] = ids  # a copy, so that the next text's ids come into the same memory, which is in the cache
        if end:
            self._held[stop] = self.tokenizer.eod
        self._num_held = stop + end
        return count + end

    def _flush(self) -> None:
        self._put(self._held[: self._num_held])
        self._num_held = 0

    def _put(self, ids: Ids) -> None:
        self._bin.write(ids.astype(DTYPES[self._code], copy=False).tobytes())
        self.num_bytes += int(np.bincount(ids, minlength=len(self._byte_lengths)) @ self._byte_lengths)

    def _end_documents(self, lengths: Sequence[int], labels: Sequence[str], place: Place | None = None) -> None:
        if min(lengths) < 1 or max(lengths) > MAX_DOCUMENT:
            at = next(i for i, length in enumerate(lengths) if not 1 <= length <= MAX_DOCUMENT)
            rule = f"{lengths[at]} tokens, outside 1 to {MAX_DOCUMENT}; split it"
            raise _at(place, at, UserError(f"document {self.num_documents + at} has {rule}"))
        for label in dict.fromkeys(labels):
            try:
                self._number(label)
            except UserError as error:
                raise _at(place, labels.index(label), error) from None
        self._label_file.write(np.fromiter(map(self._labels.__getitem__, labels), "<i4", len(labels)).tobytes())
        self._sizes.extend(lengths)
        self.num_documents += len(lengths)
        self.num_tokens += sum(lengths)

    def add_dataset(self, other: IndexedDataset) -> None:
        """Add all documents of a dataset that this class wrote with the same tokenizer, as if they were added one by one."""
        assert other.sidecar is not None
        assert other.sidecar.fingerprint == self.tokenizer.fingerprint
        self._flush()
        numbers = np.array([self._number(name) for name in other.label_names], dtype="<i4")
        with beside(other.prefix, ".bin").open("rb") as file:
            shutil.copyfileobj(file, self._bin, _COPIED)
        self._label_file.write(numbers[other.labels()].tobytes())
        self._sizes.frombytes(other.lengths().astype(np.intc).tobytes())
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_bytes += other.sidecar.num_bytes

    def _number(self, label: str) -> int:
        number = self._labels.setdefault(label, len(self._labels))
        if number >= MAX_LABELS:
            raise UserError(f"more than {MAX_LABELS} different labels (now {label!r}); choose a field with fewer values")
        return number

    def _finish(self) -> None:
        if not self._sizes:
            raise UserError(f"nothing to write to {self.prefix}: there is no document with text")
        self._flush()
        for file in (self._bin, self._label_file):
            _sync(file)
        with self._temporary[".idx"].open("wb") as file:
            self._write_index(file)
            _sync(file)
        with self._temporary[".json"].open("wb") as file:
            file.write(self._sidecar().to_json())
            _sync(file)
        if self._tokenizer_suffix:
            self.tokenizer.save(self._temporary[self._tokenizer_suffix])
        # Without an index there is no dataset: a kill between the renames cannot leave a mixture of an old and a new one.
        beside(self.prefix, ".idx").unlink(missing_ok=True)
        for suffix in self._suffixes():
            self._temporary[suffix].replace(beside(self.prefix, suffix))
        fsync_folder(self.prefix.parent)

    def _sidecar(self) -> Sidecar:
        suffix = self.tokenizer.suffix
        return Sidecar(
            tokenizer=self.tokenizer.name,
            tokenizer_file=beside(self.prefix, suffix).name if suffix else None,
            fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            eod=self.tokenizer.eod,
            label_names=tuple(self._labels),
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            source=self._source,
        )

    def _write_index(self, file: BinaryIO) -> None:
        n = len(self._sizes)
        width = DTYPES[self._code].itemsize
        file.write(HEADER.pack(MAGIC, VERSION, self._code, n, n + 1))
        for sizes in self._size_chunks():
            file.write(sizes.astype("<i4").tobytes())
        end = 0
        for sizes in self._size_chunks():
            ends = end + np.cumsum(sizes, dtype=np.int64) * width
            file.write((ends - sizes.astype(np.int64) * width).astype("<i8").tobytes())
            end = int(ends[-1])
        for start in range(0, n + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, n + 1), dtype="<i8").tobytes())

    def _size_chunks(self) -> Iterator[Ids]:
        sizes = np.frombuffer(self._sizes, dtype=np.intc)
        for start in range(0, len(sizes), _CHUNK):
            yield sizes[start : start + _CHUNK]


def _at(place: Place | None, number: int, error: UserError) -> UserError:
    return error if place is None else UserError(f"{place(number)}: {error}")


def _dtype_for(vocab_size: int) -> str:
    return "<u2" if vocab_size < UINT16_VOCABULARY else "<i4"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
