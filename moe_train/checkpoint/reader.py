"""Reading a checkpoint that anybody may have written: nothing in it runs as code, and nothing outside of it is read.

torch.distributed.checkpoint keeps its index, `.metadata`, as a pickle, and unpickles whatever in the shards is no tensor. A pickle
is a program. Here the index may build the classes of an index from few instructions and nothing else, it must say what the manifest
says, which is JSON, and what is no tensor is refused. Tensors are read by torch.load with `weights_only`.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from torch.serialization import _get_layout

from moe_train.checkpoint.manifest import (
    DTYPES,
    MANIFEST_FILE,
    Chunk,
    Entry,
    check_nothing_else,
    check_present,
    damage_of,
    damaged,
    entry_of,
    in_threads,
)
from moe_train.checkpoint.records import read_record
from moe_train.errors import UserError

INDEX_FILE = ".metadata"
Place = tuple[str, int]  # file and first byte of a record

_RECORDS = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
)
_CALLABLES: tuple[Callable[..., Any], ...] = (*_RECORDS, _MEM_FORMAT_ENCODING, PosixPath, torch.Size, _get_layout)
# Names as a pickle has them; Python 3.13 moved PosixPath.
_NAMES: dict[tuple[str, str], Any] = {(made.__module__, made.__qualname__): made for made in _CALLABLES}
_NAMES |= {(module, "PosixPath"): PosixPath for module in ("pathlib", "pathlib._local")}
_NAMES |= {("torch", str(dtype)[6:]): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_ALL_INSTRUCTIONS = pickle._Unpickler.dispatch
# What protocols 4 and 5 need for these. LONG_BINPUT, BYTEARRAY8 and the like would let a few bytes ask for gigabytes.
_INSTRUCTIONS = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1
    + pickle.SHORT_BINUNICODE + pickle.BINUNICODE + pickle.STACK_GLOBAL + pickle.REDUCE + pickle.NEWOBJ
    + pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE
    + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
)  # fmt: skip


class _IndexUnpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, whose table of instructions can be cut, unlike the one in C."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of an index")
        return _NAMES[module, name]

    def load_build(self: Any) -> None:
        if type(self.stack[-2]) not in _RECORDS:  # of a class itself, it would set attributes
            raise pickle.UnpicklingError("it changes what is no record of an index")
        _ALL_INSTRUCTIONS[pickle.BUILD[0]](self)

    dispatch = {code: _ALL_INSTRUCTIONS[code] for code in _INSTRUCTIONS} | {pickle.BUILD[0]: load_build}


class CheckpointReader(FileSystemReader):
    """The shards in a folder, of which the manifest lists `tensors`. Every record is compared with its SHA-256, whoever reads it.

    Raises UserError where the index cannot be read, asks for what is no part of an index, or is not that of the manifest.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Entry]) -> None:
        super().__init__(path)
        self._folder = path
        self._index = read_index(path, tensors)
        self._records = {
            (chunk.file, chunk.start): (name, chunk, DTYPES[entry.dtype])
            for name, entry in tensors.items()
            for chunk in entry.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, which was read and checked on opening."""
        return self._index

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Share out the records that no rank asks for: they are compared all the same."""
        wanted = {self._place(item) for plan in plans for item in plan.items}
        rest = [place for place in sorted(self._records) if place not in wanted]
        return [replace(plan, storage_data=rest[rank :: len(plans)]) for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the records of a plan in threads, in their order. Raises UserError naming tensor and file where one is damaged."""
        items: dict[Place, list[ReadItem]] = {place: [] for place in plan.storage_data}
        for item in plan.items:
            items.setdefault(self._place(item), []).append(item)
        for _ in in_threads(lambda place: self._read(place, items[place], planner), sorted(items)):
            pass
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> Place:
        found = self._index.storage_data[item.storage_index]
        return found.relative_path, found.offset

    def _read(self, place: Place, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Fill what `items` ask for of one record, which is compared also where there are none."""
        name, chunk, dtype = self._records[place]
        if not items:
            if problem := damage_of(self._folder, name, chunk):
                raise damaged(self._folder, problem)
            return
        record = read_record(self._folder, name, chunk, dtype)
        for item in items:
            target = planner.resolve_tensor(item).detach()
            target.copy_(narrow_tensor_by_index(record, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)


class TensorPlanner(DefaultLoadPlanner):
    """Fills tensors if they are those of the checkpoint: none missing, none left over, none of another shape or dtype.

    `tensors`: what the manifest lists. What the ranks ask for is compared with the sections that they ask for, such as `model`.
    """

    def __init__(self, tensors: Mapping[str, Entry]) -> None:
        super().__init__()
        self.tensors = tensors

    def create_local_plan(self) -> LoadPlan:
        """Raises ValueError where this rank asks for what is not there."""
        others = [name for name, value in self.state_dict.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(f"{others[0]} is no tensor, and only tensors are read")
        check_present({name: entry_of(value) for name, value in self.state_dict.items()}, self.tensors, MANIFEST_FILE)
        return super().create_local_plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Raises ValueError where no rank asks for a tensor of these sections."""
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        sections = {name.partition(".")[0] for name in wanted}
        there = [name for name, entry in self.tensors.items() if name.partition(".")[0] in sections and all(entry.shape)]
        check_nothing_else(wanted, there, MANIFEST_FILE)
        return super().create_global_plan(global_plan)


def read_index(path: Path, tensors: Mapping[str, Entry]) -> Metadata:
    """Read `path/.metadata`, torch's index of the shards. Raises UserError unless it says what the manifest says of `tensors`."""
    file = path / INDEX_FILE
    try:
        index = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
        if type(index) is not Metadata:
            raise ValueError(f"it holds a {type(index).__name__}")
        _compare(entries_of(index, {}), tensors)
    except Exception as error:  # a damaged pickle raises anything
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{file}: not the index of a checkpoint, or damaged: {reason}; use another checkpoint") from None
    return index


def entries_of(index: Metadata, digests: Mapping[tuple[str, int], str]) -> dict[str, Entry]:
    """What the manifest says of the tensors of an index. `digests`: (file, start) -> SHA-256 of a record.

    Raises ValueError where it holds what is no tensor, or records that are encoded.
    """
    found = {}
    for name, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, BytesStorageMetadata):
            raise ValueError(f"{name} is no tensor, and only tensors are read")
        chunks = []
        for chunk in tensor.chunks:
            place = index.storage_data[MetadataIndex(name, chunk.offsets)]
            if place.transform_descriptors:
                raise ValueError(f"{name} is encoded by {place.transform_descriptors!r}, which this code does not read")
            sha256 = digests.get((place.relative_path, place.offset), "")
            record = (place.relative_path, place.offset, place.length, sha256)
            chunks.append(Chunk(list(chunk.offsets), list(chunk.sizes), *record))
        found[name] = Entry(list(tensor.size), str(tensor.properties.dtype)[6:], chunks)
    return found


def _compare(index: Mapping[str, Entry], manifest: Mapping[str, Entry]) -> None:
    """Raise ValueError unless an index says what the manifest says, but for the digests, which it does not have."""
    check_present(manifest, index, INDEX_FILE)
    check_nothing_else(manifest, index, INDEX_FILE)
    for name, entry in index.items():
        there, said = (sorted(chunk[:5] for chunk in chunks) for chunks in (entry.chunks, manifest[name].chunks))
        if there != said:
            raise ValueError(f"the chunks of {name} are not those in {MANIFEST_FILE}")
