"""Text files, folders and JSON lines into a dataset, one document at a time.

A `.jsonl` or `.ndjson` file has one document per line, in one field of a JSON object; any other file is one document, byte for
byte. Folders are read with all folders below them, in the order of their paths, without hidden files.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_train.data.indexed import beside
from moe_train.data.sidecar import UNKNOWN_LABEL
from moe_train.data.tokenizer import Tokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

LINES = (".jsonl", ".ndjson")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """A text before it is encoded. `valid` is False when it is, or was, no valid UTF-8."""

    text: bytes
    label: str = UNKNOWN_LABEL
    valid: bool = True


@dataclass
class Summary:
    """What a preparation wrote, and what it met on the way."""

    documents: int = 0
    tokens: int = 0
    bytes_of_text: int = 0
    empty: int = 0  # documents without text, which were left out
    invalid: int = 0  # documents that are no valid UTF-8


@dataclass(frozen=True)
class Inputs:
    """Where documents come from: files and folders, the field of a JSON line, and the field of its label, if any."""

    paths: Sequence[str | os.PathLike[str]]
    field: str = "text"
    label_field: str | None = None
    without: str | os.PathLike[str] | None = None  # prefix of the output, whose files in a folder are no input

    def documents(self) -> Iterator[Document]:
        """Yield all documents, always in the same order. Raises UserError naming the file, and the line, that is wrong."""
        for path in self.files():
            if path.suffix.lower() in LINES:
                yield from self._lines(path)
            else:
                yield _whole(path)

    def files(self) -> list[Path]:
        """Return all files. Raises UserError for a path that does not exist, and when there is no file at all."""
        own = set()
        if self.without is not None:
            own = {beside(self.without, suffix).absolute() for suffix in (".bin", ".idx", ".labels", ".json", ".model")}
        files = [file for path in self.paths for file in _files_of(Path(path), own)]
        if not files:
            raise UserError(f"no files in {', '.join(map(str, self.paths)) or 'the inputs'}; name files or folders with text")
        return files

    def _lines(self, path: Path) -> Iterator[Document]:
        try:
            with path.open("rb") as file:
                _refuse_compressed(path, file.read(8))
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._document(line.removeprefix(_BOM) if number == 1 else line, f"{path}:{number}")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def _document(self, line: bytes, where: str) -> Document:
        try:
            fields = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON line ({error})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: a JSON line must be an object with the field {self.field!r}, not {_kind(fields)}")
        text = self._get(fields, self.field, where)
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.field!r} must be text, not {_kind(text)}")
        raw, valid = _to_bytes(text)
        return Document(raw, self._label(fields, where), valid)

    def _get(self, fields: dict[str, Any], name: str, where: str) -> Any:
        if name not in fields:
            found = ", ".join(map(repr, list(fields)[:8])) or "nothing"
            raise UserError(f"{where}: no field {name!r} among {found}; choose one with --field or --label-field")
        return fields[name]

    def _label(self, fields: dict[str, Any], where: str) -> str:
        if self.label_field is None:
            return UNKNOWN_LABEL
        label = self._get(fields, self.label_field, where)
        if label is None:
            return UNKNOWN_LABEL
        if not isinstance(label, str | int):
            raise UserError(f"{where}: label field {self.label_field!r} must be text or a whole number, not {_kind(label)}")
        return _to_bytes(str(label))[0].decode("utf-8", errors="replace")


def prepare(inputs: Inputs, output: str | os.PathLike[str], tokenizer: Tokenizer) -> Summary:
    """Write the documents to the dataset `output`; memory does not grow with their number but by 4 bytes each.

    Bytes that are no valid UTF-8 are kept as they are. Raises UserError for wrong inputs, and when no document has text; then
    nothing is written.
    """
    summary = Summary()
    try:
        with DatasetWriter(output, tokenizer) as writer:
            for document in inputs.documents():
                if not document.text:
                    summary.empty += 1
                    continue
                summary.invalid += not document.valid
                writer.add_text(document.text, document.label)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    summary.documents, summary.tokens, summary.bytes_of_text = writer.num_documents, writer.num_tokens, writer.num_bytes
    return summary


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
    return sorted(kept, key=lambda file: file.relative_to(path).parts)


def _whole(path: Path) -> Document:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    _refuse_compressed(path, text[:8])
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return Document(text, valid=False)
    return Document(text)


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{path} is compressed ({kind}); unpack it first")


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
