"""Text files, folders and JSON lines as documents, in pieces that can be read apart from each other.

A `.jsonl` or `.ndjson` file has one document per line, in one field of a JSON object; any other file is one document, byte for
byte, or with `lines` one document per line. Any of them may be compressed (`.gz`, `.zst`). Folders are read with all folders
below them, in the order of their paths, without hidden files; a file in them that is no text is an error.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_train.data.attack import swap_words
from moe_train.data.compressed import inner_suffix, is_compressed, reading
from moe_train.data.indexed import beside
from moe_train.data.sidecar import UNKNOWN_LABEL
from moe_train.errors import UserError

LINES = (".jsonl", ".ndjson")
OWN = (".bin", ".idx", ".labels", ".json", ".model", ".vocab", ".tokenizer")  # suffixes of a dataset's files
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_START = 8192  # bytes of a file in a folder, among which text has no zero byte
_SHOWN = 5
DOCUMENT_BLOCK = 1 << 20  # bytes of a file that is one document, encoded at a time

Policy = Literal["keep", "replace", "error"]


class Document(NamedTuple):
    """A text before it is encoded. `valid` is False when it is, or was, no valid UTF-8; `skipped` stands for a wrong line.

    Of a large file `text` is the first block, and `rest` reads the others, once, before the next document. `line` counts from the
    first one of the document's piece; 0 for a file that is one document.
    """

    text: bytes
    label: str = UNKNOWN_LABEL
    valid: bool = True
    skipped: bool = False
    rest: Iterable[bytes] = ()
    line: int = 0

    def whole(self) -> bytes:
        """Return all of the text."""
        return self.text + b"".join(self.rest)


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

    def documents(self) -> Iterator[Document]:
        """Yield all documents, always in the same order. Raises UserError naming the file, and the line, that is wrong."""
        for piece in self.pieces():
            yield from self.read(piece)

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

    def read(self, piece: Piece) -> Iterator[Document]:
        """Yield the documents of a piece. Raises UserError naming the file, and the line, that is wrong."""
        documents = self._lines(piece) if self._has_lines(piece.path) else self._whole(piece.path)
        if not self.swap_words:
            yield from documents
            return
        for document in documents:
            yield document._replace(text=swap_words(document.whole(), self.swap_words, self.seed), rest=())

    def place(self, piece: Piece, line: int) -> str:
        """Say where a document is, for people: its file, and the line where it is a line."""
        if not line:
            return str(piece.path)
        with reading(piece.path) as file:
            first = _to_line(file, piece.start)
        return f"{piece.path}:{_lines_before(piece.path, first) + line}"

    def _has_lines(self, path: Path) -> bool:
        return self.lines or inner_suffix(path) in LINES

    def _whole(self, path: Path) -> Iterator[Document]:
        blocks = _blocks(path)
        text, second = next(blocks, b""), next(blocks, None)
        if inner_suffix(path) == ".json":
            _refuse_records(path, text, self.field)
        if second is None:
            yield self._checked(text, UNKNOWN_LABEL, _is_valid([text]), str(path))
            return
        valid = _is_valid(_blocks(path))
        rest: Iterator[bytes] = chain([second], blocks)
        if not valid and self.invalid_utf8 == "replace":
            rest = _replaced(chain([text], rest))
            text = next(rest)
        yield self._checked(text, UNKNOWN_LABEL, valid, str(path))._replace(rest=rest)

    def _lines(self, piece: Piece) -> Iterator[Document]:
        parse = self._json if inner_suffix(piece.path) in LINES else self._plain
        with reading(piece.path) as file:
            at = first = _to_line(file, piece.start)
            for number, line in enumerate(file, 1):
                if piece.stop is not None and at >= piece.stop:
                    return
                at += len(line)
                text = line.removeprefix(_BOM) if first == 0 and number == 1 else line
                try:
                    document = parse(text, number)
                except _BadLineError as error:
                    if not self.skip_bad_lines:
                        raise UserError(f"{self.place(piece, number)}: {error}") from None
                    document = Document(b"", skipped=True)
                if document is not None:
                    yield document

    def _plain(self, line: bytes, number: int) -> Document:
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        return self._checked(text, UNKNOWN_LABEL, _is_valid([text]), line=number)

    def _json(self, line: bytes, number: int) -> Document | None:
        if not line.strip():
            return None
        try:
            fields = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise _BadLineError(f"not a JSON line ({error})") from None
        if not isinstance(fields, dict):
            raise _BadLineError(f"a JSON line must be an object with the field {self.field!r}, not {_kind(fields)}")
        text = _get(fields, self.field)
        if not isinstance(text, str):
            raise _BadLineError(f"field {self.field!r} must be text, not {_kind(text)}")
        raw, valid = _to_bytes(text)
        return self._checked(raw, self._label(fields), valid, line=number)

    def _checked(self, text: bytes, label: str, valid: bool, file: str | None = None, line: int = 0) -> Document:
        """Apply the policy for what is no valid UTF-8; `file` is given where a document is a file."""
        if not valid and self.invalid_utf8 == "error":
            problem = "no valid UTF-8; choose --invalid-utf8 replace or keep"
            raise UserError(f"{file}: {problem}") if file is not None else _BadLineError(problem)
        if not valid and self.invalid_utf8 == "replace":
            text = text.decode("utf-8", errors="replace").encode()
        return Document(text, label, valid, line=line)

    def _label(self, fields: dict[str, Any]) -> str:
        label = None if self.label_field is None else _get(fields, self.label_field)
        if label is None:
            return UNKNOWN_LABEL
        if not isinstance(label, str | int):
            raise _BadLineError(f"label field {self.label_field!r} must be text or a whole number, not {_kind(label)}")
        return _to_bytes(str(label))[0].decode("utf-8", errors="replace")


class _BadLineError(Exception):
    """What is wrong with a line, without where it is."""


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
        return text.encode("utf-8"), True
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
