"""Texts with a class, in the forms in which SST-2, SST-5, IMDB and BANKING77 are published, as documents whose last token has a target.

    .tsv        a header with `sentence` and `label`, as GLUE's SST-2; no quoting
    .csv        a header with `text` and `category` (BANKING77), or `review` and `sentiment` (IMDB); quoted as usual
    .json(l)    objects with these fields (SST-5 as on the Hugging Face hub)
    .txt        a labelled tree on each line, as the Stanford Sentiment Treebank; the root's label, the leaves' words
    a folder    one folder of .txt files for each class, as aclImdb/train with neg and pos (`unsup` has no labels and is left out)

A document is the text's ids and the tokenizer's end of the document. There the whole text has been seen, and the class is the target.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.compressed import inner_suffix, reading
from moe_train.data.stream import NO_TARGET
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.finetune.examples import Example, encode
from moe_train.finetune.records import Paths, Record, files_of, read_records, text_of

TEXTS = ("sentence", "text", "review")
LABELS = ("label", "category", "sentiment")
_LEAF = re.compile(r"\([^ ()]+ ([^ ()]+)\)")  # a word may hold other spaces than the plain one
_TREE = re.compile(r"\(([^ ()]+) ")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")"}


class Labelled(NamedTuple):
    """A text and its class."""

    where: str
    text: str
    label: str


def read_labelled(paths: Paths) -> list[Labelled]:
    """All texts. Raises UserError naming the file, the line or entry, and the field that is wrong."""
    found = [one for path in files_of(paths) for one in _read(path)]
    if empty := next((one for one in found if not one.text.strip()), None):
        raise UserError(f"{empty.where}: the text is empty; remove it")
    return found


def class_names(texts: Iterable[Labelled], where: str) -> list[str]:
    """The classes there are, sorted, numbers by value. Raises UserError where there is one alone."""
    names = {one.label for one in texts}
    if len(names) < 2:
        raise UserError(f"{where}: holds {' and '.join(names) or 'no class'} alone; a classifier needs two classes or more")
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def encode_labelled(texts: Iterable[Labelled], classes: list[str], tokenizer: Tokenizer) -> Iterator[Example]:
    """Each text as a document. Raises UserError for a class that is none of `classes`."""
    numbers = {name: i for i, name in enumerate(classes)}
    for where, text, label in texts:
        if label not in numbers:
            shown = ", ".join(classes[:8]) + ", ..." * (len(classes) > 8)
            raise UserError(
                f"{where}: class {label!r} is none of the {len(classes)} of sft.train or sft.classes ({shown}); add it"
            )
        ids = encode(text, tokenizer, where, end=True)
        targets = np.full_like(ids, NO_TARGET)
        targets[-1] = numbers[label]
        yield Example(where, ids, targets)


def without_middle(example: Example, size: int) -> Example:
    """What is left of an example of which `size` tokens are kept: its beginning, and the token with the target."""
    keep = np.append(np.arange(size - 1), len(example.tokens) - 1)
    return example._replace(tokens=example.tokens[keep], targets=example.targets[keep])


def _read(path: Path) -> Iterator[Labelled]:
    if os.path.isdir(path):
        return _folder(path)
    kind = inner_suffix(path)
    if kind in (".tsv", ".csv"):
        return _labelled(_table(path, tabs=kind == ".tsv"))
    return _trees(path) if kind == ".txt" else _labelled(read_records(path))


def _folder(path: Path) -> Iterator[Labelled]:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name != "unsup" and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{path}: has no folder for each class, with .txt files in it; give a folder that has")
    for folder in folders:
        for file in sorted(folder.glob("*.txt")):
            yield Labelled(str(file), _text(file), folder.name)


def _text(path: Path) -> str:
    with reading(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: no valid UTF-8 ({error}); convert it") from None


def _table(path: Path, tabs: bool) -> Iterator[tuple[str, Record]]:
    """Rows as records; the place is that of a row's last line."""
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows = csv.reader(io.StringIO(_text(path), newline=""), **form)
    try:
        header = next(rows, [])
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if row and len(row) != len(header):
                raise UserError(f"{where}: {len(row)} columns, where the header has {len(header)} ({', '.join(header)})")
            if row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not a table ({error}); correct it") from None


def _labelled(records: Iterable[tuple[str, Record]]) -> Iterator[Labelled]:
    for where, record in records:
        text, label = (_first(record, names, where) for names in (TEXTS, LABELS))
        value = record[label]
        if type(value) not in (str, int) or value == "":
            raise UserError(f"{where}: field {label!r} must be a class, as text or a whole number, not {value!r}")
        yield Labelled(where, text_of(record, text, where), str(value))


def _first(record: Record, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in record:
            return name
    raise UserError(
        f"{where}: none of the fields {', '.join(names)} among {', '.join(map(repr, list(record)[:8]))}; name one so"
    )


def _trees(path: Path) -> Iterator[Labelled]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        root, words = _TREE.match(line.strip()), _LEAF.findall(line)
        if root is None or not words or line.count("(") != line.count(")"):
            raise UserError(f"{path}:{number}: not a labelled tree such as (3 (2 It) (4 works)); give a .tsv, .csv or .jsonl")
        yield Labelled(f"{path}:{number}", " ".join(_BRACKETS.get(word, word.replace("\\", "")) for word in words), root[1])
