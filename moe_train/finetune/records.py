"""Objects in JSON files, each with the place that an error names."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.data.compressed import inner_suffix, reading
from moe_train.data.inputs import LINES
from moe_train.errors import UserError

Record = dict[str, Any]
Paths = str | list[str]


def files_of(paths: Paths) -> list[Path]:
    """The paths as a list. Raises UserError for one that does not exist."""
    found = [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    for path in found:
        if not os.path.exists(path):
            raise UserError(f"{path}: does not exist; name a file of examples")
    return found


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Each object of a list in a `.json` file, or of a `.jsonl` file (either may be `.gz` or `.zst`), with its place.

    Raises UserError naming the entry or the line that is wrong.
    """
    if inner_suffix(path) in LINES:
        items = _lines(path)
    elif inner_suffix(path) == ".json":
        items = _entries(path)
    else:
        raise UserError(f"{path}: not a .json or .jsonl file; convert it, or give another one")
    for where, item in items:
        if not isinstance(item, dict):
            raise UserError(f"{where}: must be a JSON object, not {type(item).__name__}")
        yield where, item


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    with reading(path) as file:
        content = _parse(file.read(), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: must be a JSON list of objects, not {type(content).__name__}; one object a line is .jsonl")
    yield from ((f"{path}: entry {number}", item) for number, item in enumerate(content, 1))


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); correct it") from None


def text_of(record: Record, field: str, where: str) -> str:
    """The text in a field. Raises UserError where there is none."""
    if field not in record:
        raise UserError(f"{where}: no field {field!r} among {', '.join(map(repr, list(record)[:8])) or 'nothing'}; add it")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be text, not {type(value).__name__}")
    return value
