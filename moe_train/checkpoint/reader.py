"""Reading a checkpoint that anybody may have written: nothing in it runs as code, and nothing outside of it is read.

torch.distributed.checkpoint keeps its index, `.metadata`, as a pickle, and a pickle is a program. The manifest, which is JSON, says
all that the index says, so the index is made from it, and `.metadata` is there for other readers: here it is hashed, never opened as
a pickle. What is no tensor is refused, and tensors are read by torch.load with `weights_only`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from moe_train.checkpoint.manifest import (
    DTYPES,
    MANIFEST_FILE,
    Entry,
    check_nothing_else,
    check_present,
    damage_of,
    damaged,
    entry_of,
    in_threads,
)
from moe_train.checkpoint.records import read_record

Place = tuple[str, int]  # file and first byte of a record


class CheckpointReader(FileSystemReader):
    """The shards in a folder, of which the manifest lists `tensors`. Every record is compared with its SHA-256, whoever reads it."""

    def __init__(self, path: Path, tensors: Mapping[str, Entry]) -> None:
        super().__init__(path)
        self._folder = path
        self._index = index_of(tensors)
        self._records = {
            (chunk.file, chunk.start): (name, chunk, DTYPES[entry.dtype])
            for name, entry in tensors.items()
            for chunk in entry.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, from the manifest."""
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


def index_of(tensors: Mapping[str, Entry]) -> Metadata:
    """torch's index of the tensors of a manifest."""
    listed: dict[str, STORAGE_TYPES] = {}
    places = {}
    for name, entry in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
        listed[name] = TensorStorageMetadata(TensorProperties(DTYPES[entry.dtype]), torch.Size(entry.shape), chunks)
        for number, (chunk, box) in enumerate(zip(entry.chunks, chunks, strict=True)):
            places[MetadataIndex(name, box.offsets, number)] = _StorageInfo(chunk.file, chunk.start, chunk.bytes)
    return Metadata(listed, storage_data=places)
