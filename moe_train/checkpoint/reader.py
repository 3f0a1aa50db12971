"""Reading a checkpoint that anybody may have written: nothing in it runs as code, and nothing outside of it is read.

torch.distributed.checkpoint keeps its index, `.metadata`, as a pickle, and unpickles whatever in the shards is no tensor. A pickle
is a program. Here the index may build the classes of an index from few instructions and nothing else, its entries must lie inside the
files of the checkpoint, and what is no tensor is refused. Tensors are read by torch.load with `weights_only`.
"""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
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
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from moe_train.errors import UserError

INDEX_FILE = ".metadata"

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
    """The shards in a folder. `sizes`: file name -> bytes, of the files that belong to the checkpoint.

    Raises UserError where the index cannot be read, asks for what is no part of an index, or does not fit the files.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(path)
        self._index = read_index(path, sizes)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, which was read and checked on opening."""
        return self._index


class TensorPlanner(DefaultLoadPlanner):
    """Fills tensors, and refuses what is none in the checkpoint."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raise ValueError, where torch would unpickle anything."""
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor in the checkpoint, and only tensors are read")


def read_index(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """Read `path/.metadata`, checked against the sizes of the checkpoint's files. Raises UserError where it is not sound."""
    file = path / INDEX_FILE
    try:
        index = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
        if type(index) is not Metadata:
            raise ValueError(f"it holds a {type(index).__name__}")
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(entry, BytesStorageMetadata):
                _check_chunks(name, entry)
        for where, place in index.storage_data.items():
            _check_place(where.fqn, place, sizes)
    except Exception as error:  # a damaged pickle raises anything
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{file}: not the index of a checkpoint, or damaged: {reason}; use another checkpoint") from None
    return index


def _check_chunks(name: str, tensor: TensorStorageMetadata) -> None:
    """Raise ValueError unless the chunks of a tensor lie in it and are as large as it is together."""
    covered = 0
    for chunk in tensor.chunks:
        for start, length, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True):
            if start < 0 or length < 0 or start + length > whole:
                raise ValueError(f"{name} of {list(tensor.size)} has a chunk of {list(chunk.sizes)} at {list(chunk.offsets)}")
        covered += math.prod(chunk.sizes)
    if covered != math.prod(tensor.size):
        raise ValueError(f"{name} of {list(tensor.size)} has {covered} of its {math.prod(tensor.size)} numbers")


def _check_place(name: str, place: _StorageInfo, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless the bytes lie in a file of the checkpoint, as they are."""
    size = sizes.get(place.relative_path)
    if size is None:
        raise ValueError(f"{name} is in {place.relative_path!r}, which is no file of this checkpoint")
    if place.offset < 0 or place.length < 1 or place.offset + place.length > size:
        raise ValueError(f"{name} is at byte {place.offset} of {place.relative_path}, {place.length} long, of {size} bytes")
    if place.transform_descriptors:
        raise ValueError(f"{name} is encoded by {place.transform_descriptors!r}, which this code does not read")
