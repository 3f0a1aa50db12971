"""The manifest of a checkpoint: what is in it, whole and without overlap, and how to tell that a byte has changed.

`manifest.json` holds `step`, what the trainer adds (`loader`: place in the data; `config`; `tokenizer`: its hash), `files` and
`tensors`, and the SHA-256 of all that.

- `files`: name -> {bytes, sha256} of every other file; shards (`*.distcp`) have `bytes` only.
- `tensors`: logical name -> {shape, dtype, chunks}, whatever the layout was. A chunk is [offsets, sizes, file, start, bytes, sha256]:
  the box of the logical tensor that it holds, where its record is, and the SHA-256 of that record.

Checksums are those of the chunks as they are stored: each rank hashes what it has written, nothing is gathered but the digests, and on
loading the ranks share the chunks out. Records follow each other without gaps, so that every byte of a shard belongs to a tensor.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_train.errors import UserError

MANIFEST_FILE = "manifest.json"
SHARDS = "*.distcp"
PREFIX = "step-"
BLOCK = 1 << 20  # bytes that are hashed at a time
THREADS = min(4, os.cpu_count() or 1)  # that hash and read at once

Item = TypeVar("Item")
Result = TypeVar("Result")
Manifest = dict[str, Any]
Box = tuple[tuple[int, int], ...]  # start and end along each dimension
DTYPES = {str(dtype)[6:]: dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class Chunk(NamedTuple):
    """A box of a logical tensor, and the record that holds it."""

    offsets: list[int]
    sizes: list[int]
    file: str
    start: int
    bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.sizes} at {self.offsets}"


class Entry(NamedTuple):
    """A logical tensor."""

    shape: list[int]
    dtype: str
    chunks: list[Chunk]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def damaged(path: Path, problem: str) -> UserError:
    """What to tell a user whose checkpoint at `path` is not as it was saved."""
    return UserError(
        f"{path}: damaged: {problem}; use another checkpoint, or remove this one: a run goes on from the one before"
    )


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size, and its SHA-256 unless it is a shard, whose records have theirs."""
    size = path.stat().st_size
    return {"bytes": size} if path.match(SHARDS) else {"bytes": size, "sha256": hash_record(path, 0, size)}


def hash_record(path: Path, start: int, length: int) -> str:
    """SHA-256 of `length` bytes of a file, read in blocks."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while length and (block := file.read(min(length, BLOCK))):
            found.update(block)
            length -= len(block)
    return found.hexdigest()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` gives for each item, in their order. Reading and hashing hold no lock of Python's, so that threads share them out."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(work, items)


def seal(content: Manifest) -> bytes:
    """A manifest as its file has it, with the SHA-256 of the rest."""
    return json.dumps({**content, "sha256": _sum(content)}).encode()


def _sum(content: Manifest) -> str:
    """The SHA-256 of a manifest as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of checkpoint `path`, with `tensors` as name -> Entry. Reads every file but the shards, of which it checks the size.

    Raises UserError, naming file and tensor, where a file is missing or not as it was written, or a tensor is not whole.
    """
    content = parse_manifest(path)
    if problem := next(damaged_files(path, content), None):
        raise damaged(path, problem)
    return content


def parse_manifest(path: Path) -> Manifest:
    """`read_manifest` without a look at the other files."""
    try:
        written = (path / MANIFEST_FILE).read_bytes()
        content = json.loads(written.decode())
        said = content.pop("sha256", None) if isinstance(content, dict) else None
        whole = said is not None and written == seal(content)  # its bytes: 1e-05 may become 1E-05 and the content stays
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not a complete checkpoint: {MANIFEST_FILE}: {error}") from None
    if not whole:
        raise damaged(path, f"{MANIFEST_FILE} is not as it was saved")
    _check_types(path, content)
    content["tensors"] = _parse_tensors(path, content)
    return content


def damaged_files(path: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of checkpoint `path`; of shards only their size is looked at."""
    for name, said in manifest["files"].items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != said["bytes"]:
            yield f"{name} has {there} of {said['bytes']} bytes{_lost(manifest['tensors'], name)}"
        elif file_entry(file) != said:
            yield f"{name} does not have the SHA-256 that it was saved with"


def damaged_chunks(path: Path, chunks: Iterable[tuple[str, Chunk]]) -> Iterator[str]:
    """Of chunks (tensor, chunk) of checkpoint `path`, what is wrong with those whose records have changed."""
    yield from filter(None, in_threads(lambda item: damage_of(path, *item), chunks))


def damage_of(path: Path, name: str, chunk: Chunk) -> str | None:
    """What is wrong with the record of a chunk of tensor `name`, if anything is."""
    try:
        if hash_record(path / chunk.file, chunk.start, chunk.bytes) != chunk.sha256:
            return f"{name}, {chunk}, in {chunk.file} does not have the SHA-256 that it was saved with"
    except OSError as error:
        return f"{name}, {chunk}, in {chunk.file} cannot be read: {error}"
    return None


def _lost(tensors: Mapping[str, Entry], file: str) -> str:
    """Which tensors are in a file."""
    names = [name for name, entry in tensors.items() if any(chunk.file == file for chunk in entry.chunks)]
    return f"; it holds {names[0]}" + f" and {len(names) - 1} more tensors" * (len(names) > 1) if names else ""


def _check_types(path: Path, content: Manifest) -> None:
    """Raise UserError unless a manifest has the step that the folder is named after, a config, and an entry of files in the folder."""
    step, files = content.get("step"), content.get("files")
    named = path.name.removeprefix(PREFIX)
    if type(step) is not int or step < 0 or (path.name.startswith(PREFIX) and named != f"{step:08d}"):
        raise damaged(path, f"{MANIFEST_FILE} says step={step!r}, which must be the number in the folder's name")
    if not isinstance(content.get("config", {}), dict):
        raise damaged(path, f"{MANIFEST_FILE} has no config")
    if not isinstance(files, dict) or not all(_is_file(name, said) for name, said in files.items()):
        raise damaged(path, f"{MANIFEST_FILE} has no bytes and sha256 of each file in the folder")


def _parse_tensors(path: Path, content: Manifest) -> dict[str, Entry]:
    """The tensors of a manifest. Raises UserError unless each is whole and they fill the shards."""
    try:
        listed = content["tensors"].items()
        tensors = {name: Entry(v["shape"], v["dtype"], [Chunk(*chunk) for chunk in v["chunks"]]) for name, v in listed}
        sound = all(map(_is_entry, tensors.values()))
    except (AttributeError, LookupError, TypeError):
        sound = False
    if not sound:
        raise damaged(path, f"{MANIFEST_FILE} has no shape, dtype and chunks of each tensor")
    try:
        for name, entry in tensors.items():
            check_cover(name, entry.shape, [(chunk.offsets, chunk.sizes, chunk.file) for chunk in entry.chunks])
        shards = {name: said["bytes"] for name, said in content["files"].items() if Path(name).match(SHARDS)}
        check_records(tensors, shards)
    except ValueError as error:
        raise damaged(path, f"{MANIFEST_FILE}: {error}") from None
    return tensors


def _is_file(name: str, said: Any) -> bool:
    keys = {"bytes"} if Path(name).match(SHARDS) else {"bytes", "sha256"}
    return Path(name).name == name and isinstance(said, dict) and said.keys() == keys and type(said["bytes"]) is int


def _is_entry(entry: Entry) -> bool:
    lists = [entry.shape, *(part for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes))]
    return (
        entry.dtype in DTYPES
        and all(isinstance(sizes, list) and len(sizes) == len(entry.shape) and _are_sizes(sizes) for sizes in lists)
        and all(_are_sizes([chunk.start, chunk.bytes]) for chunk in entry.chunks)
        and all(isinstance(chunk.file, str) and isinstance(chunk.sha256, str) for chunk in entry.chunks)
    )


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def check_cover(name: str, shape: Iterable[int], chunks: Iterable[tuple[Iterable[int], Iterable[int], str]]) -> None:
    """Raise ValueError unless the chunks (offsets, sizes, file) of a tensor cover each of its numbers once."""
    shape = list(shape)
    missing: list[Box] = [tuple((0, size) for size in shape)]
    left = math.prod(shape)
    for offsets, sizes, file in sorted((list(offsets), list(sizes), file) for offsets, sizes, file in chunks):
        box = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
        if any(end > size for (_, end), size in zip(box, shape, strict=True)):
            raise ValueError(f"{name} of {shape} has a chunk of {sizes} at {offsets} in {file}, which is not inside of it")
        before, missing = left, [rest for part in missing for rest in _without(part, box)]
        left = sum(map(_volume, missing))
        if before - left != math.prod(sizes):
            raise ValueError(f"{name} of {shape} has a chunk of {sizes} at {offsets} in {file} that overlaps another one")
    if (gap := next(filter(_volume, missing), None)) is not None:
        lacking = f"{[end - start for start, end in gap]} at {[start for start, _ in gap]}"
        raise ValueError(f"{name} of {shape} lacks {lacking}, which is in no file")


def _volume(box: Box) -> int:
    return math.prod(end - start for start, end in box)


def _without(box: Box, cut: Box) -> list[Box]:
    """What is left of a box, as boxes."""
    inner = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, cut, strict=True))
    if any(start >= end for start, end in inner):
        return [box]
    left = []
    for dim, ((a, b), (start, end)) in enumerate(zip(box, inner, strict=True)):
        left += [(*inner[:dim], part, *box[dim + 1 :]) for part in ((a, start), (end, b)) if part[0] < part[1]]
    return left


def check_records(tensors: Mapping[str, Entry], sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless the records of all chunks fill the shards (name -> bytes) one after another."""
    records: dict[str, list[tuple[int, int, str]]] = {file: [] for file in sizes}
    for name, entry in tensors.items():
        for chunk in entry.chunks:
            if chunk.file not in records:
                raise ValueError(f"{name} is in {chunk.file!r}, which is no shard of this checkpoint")
            records[chunk.file].append((chunk.start, chunk.bytes, name))
    for file, found in records.items():
        end = 0
        for start, length, name in sorted(found):
            if start != end or length < 1:
                raise ValueError(f"{name} is at byte {start} of {file}, {length} long, where the record before ends at {end}")
            end += length
        if end != sizes[file]:
            raise ValueError(f"{file} has {sizes[file]} bytes, of which tensors have {end}")


def check_present(wanted: Mapping[str, Entry], there: Mapping[str, Entry], file: str) -> None:
    """Raise ValueError unless every tensor that is wanted is there, of the same shape and dtype; `file` is where it was looked for."""
    for name, entry in wanted.items():
        found = there.get(name)
        if found is None:
            raise ValueError(f"{name}, {entry}, is missing in {file}")
        if found[:2] != entry[:2]:
            raise ValueError(f"{name} is {found} in {file}, where {entry} is wanted")


def check_nothing_else(wanted: Collection[str], there: Iterable[str], file: str) -> None:
    """Raise ValueError where there is a tensor that is not wanted."""
    extra = [name for name in there if name not in wanted]
    if extra:
        more = f" and {len(extra) - 1} more" * (len(extra) > 1)
        raise ValueError(f"{extra[0]}{more} in {file}, which nothing asks for")


def entry_of(tensor: Tensor) -> Entry:
    """What a manifest says of a tensor, without its chunks."""
    return Entry(list(tensor.shape), str(tensor.dtype)[6:], [])
