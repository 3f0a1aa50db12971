"""Text files, folders and JSON lines as documents, in pieces that can be read apart from each other.

A `.jsonl` or `.ndjson` file has one document per line, in one field of a JSON object; any other file is one document, byte for
byte, or with `lines` one document per line. Any of them may be compressed (`.gz`, `.zst`). Folders are read with all folders
below them, in the order of their paths, without hidden files; a file in them that is no text is an error.
"""

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moe_train.data.attack import swap_words
from moe_train.data.compressed import inner_suffix, is_compressed, reading
from moe_train.data.indexed import beside
from moe_train.data.sidecar import UNKNOWN_LABEL
from moe_train.errors import UserError

LINES = (".jsonl", ".ndjson")
OWN = (".bin", ".idx", ".labels", ".json", ".model", ".vocab", ".tokenizer")  # suffixes of a dataset's files
_INVALID = "no valid UTF-8; choose --invalid-utf8 replace or keep"
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_START = 8192  # bytes of a file in a folder, among which text has no zero byte
_SHOWN = 5
DOCUMENT_BLOCK = 1 << 20  # bytes of a file that is one document, encoded at a time
BATCH = 1 << 18  # bytes of lines that are read at a time, and then encoded
_DECODER = json.JSONDecoder()

Policy = Literal["keep", "replace", "error"]


@dataclass
class Batch:
    """Documents with text that are read together, before they are encoded, and how many others were met among them.

    A file that is one document is a batch of its own. Of a large one the text is the first block, and `rest` reads the others, once,
    before the next batch. `lines` count from the first one of the piece; 0 for a file that is one document.
    """

    texts: list[bytes] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rest: Iterable[bytes] = ()
    empty: int = 0  # documents without text
    invalid: int = 0  # of `texts`, those that are, or were, no valid UTF-8
    skipped: int = 0  # wrong lines

    def add(self, text: bytes, label: str, valid: bool, line: int) -> None:
        """Add a document, or count it where it has no text."""
        if text:
            self.texts.append(text)
            self.labels.append(label)
            self.lines.append(line)
            self.invalid += not valid
        else:
            self.empty += 1

    def whole(self) -> list[bytes]:
        """Return the texts with all of their blocks."""
        return [text + b"".join(self.rest) for text in self.texts] if self.rest else self.texts


@dataclass(frozen=True)
class Piece:
    """A file, or its lines that start at bytes [start, stop). `size` in bytes tells how much work it is."""

    path: Path
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Inputs:
    """Where documents come from, and how they are read."""

    paths: Sequence[str | os.PathLike[str]]
    field: str = "text"  # of a JSON line
    label_field: str | None = None
    without: str | os.PathLike[str] | None = None  # prefix of the output, whose files in a folder are no input
    lines: bool = False  # each line of a text file is a document
    invalid_utf8: Policy = "keep"
    skip_bad_lines: bool = False
    swap_words: float = 0.0  # share of words that the word-swap attack replaces
    seed: int = 0  # of the attack

    def texts(self) -> Iterator[bytes]:
        """Yield the text of each document, always in the same order. Raises UserError naming the file, and the line, that is wrong."""
        for piece in self.pieces():
            for batch in self.read(piece):
                yield from batch.whole()

    def files(self) -> list[Path]:
        """Return all files. Raises UserError for a path that does not exist, files in a folder that are no text, and no file."""
        own = {beside(self.without, suffix).absolute() for suffix in OWN} if self.without is not None else set()
        files = [file for path in self.paths for file in _files_of(Path(path), own)]
        if not files:
            raise UserError(f"no files in {', '.join(map(str, self.paths)) or 'the inputs'}; name files or folders with text")
        return files

    def pieces(self, size: int = 1 << 62) -> Iterator[Piece]:
        """Yield the files in order, those of lines that are not compressed in ranges of `size` bytes."""
        for path in self.files():
            whole = _size(path)
            if self._has_lines(path) and not is_compressed(path):
                for start in range(0, max(whole, 1), size):
                    stop = min(start + size, whole)
                    yield Piece(path, start, stop, stop - start)
            else:
                yield Piece(path, 0, None, whole)

    def read(self, piece: Piece) -> Iterator[Batch]:
        """Yield the documents of a piece. Raises UserError naming the file, and the line, that is wrong."""
        batches = self._lines(piece) if self._has_lines(piece.path) else self._whole(piece.path)
        if not self.swap_words:
            yield from batches
            return
        for batch in batches:
            yield replace(batch, texts=[swap_words(text, self.swap_words, self.seed) for text in batch.whole()], rest=())

    def place(self, piece: Piece, batch: Batch, number: int) -> str:
        """Say where a document of a batch is, for people: its file, and the line where it is a line."""
        return self._place(piece, batch.lines[number])

    def _place(self, piece: Piece, line: int) -> str:
        if not line:
            return str(piece.path)
        with reading(piece.path) as file:
            first = _to_line(file, piece.start)
        return f"{piece.path}:{_lines_before(piece.path, first) + line}"

    def _has_lines(self, path: Path) -> bool:
        return self.lines or inner_suffix(path) in LINES

    def _whole(self, path: Path) -> Iterator[Batch]:
        blocks = _blocks(path)
        text, second = next(blocks, b""), next(blocks, None)
        if inner_suffix(path) == ".json":
            _refuse_records(path, text, self.field)
        batch = Batch()
        valid = _is_valid([text] if second is None else _blocks(path))
        if not valid and self.invalid_utf8 == "error":
            raise UserError(f"{path}: {_INVALID}")
        if second is not None:
            batch.rest = chain([second], blocks)
        if not valid and self.invalid_utf8 == "replace":
            batch.rest = filter(None, _replaced(chain([text], batch.rest)))
            text = next(batch.rest)
        batch.add(text, UNKNOWN_LABEL, valid, 0)
        yield batch

    def _lines(self, piece: Piece) -> Iterator[Batch]:
        add = self._add_json if inner_suffix(piece.path) in LINES else self._add_plain
        number = 0
        with reading(piece.path) as file:
            for lines in _batches(file, piece):
                batch = Batch()
                for line in lines:
                    number += 1
                    try:
                        add(batch, line, number)
                    except _BadLineError as error:
                        if not self.skip_bad_lines:
                            yield batch  # what the tokenizer finds wrong in lines before this one is named first
                            raise UserError(f"{self._place(piece, number)}: {error}") from None
                        batch.skipped += 1
                yield batch

    def _add_plain(self, batch: Batch, line: bytes, number: int) -> None:
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        valid = text.isascii() or _is_valid([text])
        batch.add(text if valid else self._invalid(text), UNKNOWN_LABEL, valid, number)

    def _add_json(self, batch: Batch, line: bytes, number: int) -> None:
        if not line or line.isspace():
            return
        try:
            fields = _parse(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise _BadLineError(f"not a JSON line ({error})") from None
        if not isinstance(fields, dict):
            raise _BadLineError(f"a JSON line must be an object with the field {self.field!r}, not {_kind(fields)}")
        text = fields[self.field] if self.field in fields else _get(fields, self.field)
        if not isinstance(text, str):
            raise _BadLineError(f"field {self.field!r} must be text, not {_kind(text)}")
        label = UNKNOWN_LABEL if self.label_field is None else self._label(fields, self.label_field)
        raw, valid = _to_bytes(text)
        batch.add(raw if valid else self._invalid(raw), label, valid, number)

    def _invalid(self, line: bytes) -> bytes:
        """Apply the policy for what is no valid UTF-8."""
        if self.invalid_utf8 == "error":
            raise _BadLineError(_INVALID)
        return line.decode("utf-8", errors="replace").encode() if self.invalid_utf8 == "replace" else line

    def _label(self, fields: dict[str, Any], name: str) -> str:
        label = _get(fields, name)
        if label is None:
            return UNKNOWN_LABEL
        if not isinstance(label, str | int):
            raise _BadLineError(f"label field {name!r} must be text or a whole number, not {_kind(label)}")
        return _to_bytes(str(label))[0].decode("utf-8", errors="replace")


class _BadLineError(Exception):
    """What is wrong with a line, without where it is."""


def _batches(file: BinaryIO, piece: Piece) -> Iterator[list[bytes]]:
    """Yield the lines that start in the range of a piece, some at a time."""
    at = _to_line(file, piece.start)
    stop = sys.maxsize if piece.stop is None else piece.stop
    while at < stop and (lines := file.readlines(BATCH)):
        start, at = at, at + sum(map(len, lines))
        while at - len(lines[-1]) >= stop:
            at -= len(lines.pop())
        if start == 0:
            lines[0] = lines[0].removeprefix(_BOM)
        yield lines


def _parse(line: str) -> Any:
    """Return json.loads(line), in two thirds of its time for a line without white space around the value."""
    try:
        value, end = _DECODER.raw_decode(line)
        if line[end:] == "\n":
            return value
    except ValueError:
        pass
    return json.loads(line)


def _to_line(file: Any, start: int) -> int:
    """Go to the first line that starts at `start` or behind it, and return where that is."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _lines_before(path: Path, first: int) -> int:
    """Count the lines before byte `first`; only errors want to know it."""
    count = 0
    if first:
        with path.open("rb") as file:
            while first > 0 and (block := file.read(min(_BLOCK, first))):
                count += block.count(b"\n")
                first -= len(block)
    return count


def _get(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        found = ", ".join(map(repr, list(fields)[:8])) or "nothing"
        raise _BadLineError(f"no field {name!r} among {found}; choose one with --field or --label-field")
    return fields[name]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _files_of(path: Path, without: set[Path]) -> list[Path]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):  # False for names that no file can have
        raise UserError(f"input {path} does not exist")
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = [file for file in files if file.is_file() and file.absolute() not in without]
    if wrong := sorted(str(file) for file in kept if not _may_be_text(file)):
        shown = ", ".join(wrong[:_SHOWN]) + ", ..." * (len(wrong) > _SHOWN)
        raise UserError(f"{path}: {len(wrong)} of its files are no text ({shown}); remove them, or name the files that are")
    return sorted(kept, key=lambda file: file.relative_to(path).parts)


def _may_be_text(path: Path) -> bool:
    """Say whether the beginning of a file has no zero byte. What is compressed, or cannot be read, is judged where it is read."""
    if is_compressed(path):
        return True
    with reading(path) as file:
        return b"\0" not in file.read(_START)


def _refuse_records(path: Path, text: bytes, field: str) -> None:
    """Raise UserError for a .json file with documents in `field`, which would be read as one text with all its brackets."""
    for part in (text.partition(b"\n")[0], text):
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        first = found[0] if isinstance(found, list) and found else found
        if isinstance(first, dict) and field in first:
            rule = f"holds JSON objects with the field {field!r}, which are read from a .jsonl file, one on each line"
            raise UserError(f"{path}: {rule}; rename or convert it")


def _blocks(path: Path) -> Iterator[bytes]:
    with reading(path) as file:
        while block := file.read(DOCUMENT_BLOCK):
            yield block


def _is_valid(blocks: Iterable[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks:
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _replaced(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The text with U+FFFD for what is no valid UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for block in blocks:
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


def _to_bytes(text: str) -> tuple[bytes, bool]:
    """Return the text in UTF-8 and whether it was valid: bytes that were not are restored, lone surrogates become U+FFFD."""
    try:
        return text.encode(), True
    except UnicodeEncodeError:
        pass
    try:
        return text.encode("utf-8", errors="surrogateescape"), False
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace").encode("utf-8"), False


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )
