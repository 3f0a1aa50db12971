"""Checkpoints: torch.distributed.checkpoint shards in a folder that appears whole or not at all.

`step-00000100/` holds the shards, `.metadata`, `config.yaml`, `tokenizer`, `rng.safetensors` and `manifest.json`, which says what all
of that is (checkpoint/manifest.py). It is written under a temporary name, synced, and renamed last, so that a folder with the final
name is complete; `load` notices every byte that changed later, and every tensor that is not whole or not the model's.
"""

import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from moe_train.checkpoint.manifest import (
    DTYPES,
    MANIFEST_FILE,
    PREFIX,
    Chunk,
    Entry,
    Manifest,
    check_cover,
    check_nothing_else,
    check_present,
    entry_of,
    file_entry,
    hash_record,
    in_threads,
    read_manifest,
    seal,
)
from moe_train.checkpoint.reader import CheckpointReader, TensorPlanner
from moe_train.errors import UserError
from moe_train.files import cannot_write, fsync_file, fsync_folder, write_atomically

INDEX_FILE = ".metadata"  # torch's, for other readers of its format
TEMPORARY = ".tmp-"

Group = dist.ProcessGroup | None  # None = all ranks
Digests = dict[tuple[str, int], str]  # (file, start of a record) -> SHA-256
Places = dict[MetadataIndex, Any]  # chunk -> file, start and length of its record


class NotSaved(UserError):
    """The disk refused a checkpoint."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Any],
    state: dict[str, Any],
    files: dict[str, bytes],
    expected: Mapping[str, Tensor] | None = None,
    group: Group = None,
) -> Path:
    """Write the checkpoint of `step` into `folder` from all ranks, which are those of `group`.

    `tensors`: this rank's shards in nested dicts. `state`: JSON for the manifest. `files`: further files of rank 0, name -> content.
    `expected`: the whole tensors (on meta) that all ranks together must give.
    Raises NotSaved on every rank where the disk refuses; the checkpoints that were there stay, and nothing half-written does. Raises
    UserError where a tensor is not whole or not as expected.
    """
    final = folder / f"{PREFIX}{step:08d}"
    work = folder / f"{TEMPORARY}{final.name}"
    try:
        on_main(lambda: _prepare(work), group)
        writer = _Writer(work, sync_files=True)
        index = _save_shards(tensors, writer, _Planner(expected), group)
        parts: list[Digests] | None = [{}] * dist.get_world_size(group) if dist.get_rank() == 0 else None
        dist.gather_object(writer.digests, parts, group=group)
        digests = {record: sha256 for part in parts or () for record, sha256 in part.items()}
        on_main(lambda: _publish(work, final, files, {"step": step, **state}, _entries(index, writer.places, digests)), group)
    except BaseException as error:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise NotSaved(f"step {step} is not saved: {cannot_write(folder, error)}") from error
        raise
    return final


def on_main(write: Callable[[], object], group: Group = None) -> None:
    """Run `write` on rank 0 while the others wait. An OSError there is raised on every rank, so that none waits for ever."""
    refused: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            refused = [error]
    dist.broadcast_object_list(refused, group=group)
    if refused[0] is not None:
        raise refused[0]


class _Planner(DefaultSavePlanner):
    """Checks on rank 0, before anything is written, that all ranks together have whole tensors, and the expected ones."""

    def __init__(self, expected: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.expected = expected

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises UserError naming the tensor and the shard."""
        try:
            planned = _planned(all_plans)
            if self.expected is not None:
                expected = {name: entry_of(tensor) for name, tensor in self.expected.items()}
                check_present(expected, planned, "the shards")
                check_nothing_else(expected, planned, "the shards")
        except ValueError as error:
            raise UserError(f"the ranks do not hold the model's whole state: {error}; earlier checkpoints stay") from None
        return super().create_global_plan(all_plans)

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """torch's own, without its validation: that compares the chunks of a tensor in pairs, and they have been checked above."""
        plans, index = create_default_global_save_plan(dedup_save_plans(all_plans))
        names = dict(ChainMap(*(plan.planner_data for plan in plans)))
        return plans, replace(index, planner_data=names)


def _planned(plans: list[SavePlan]) -> dict[str, Entry]:
    """The tensors of all ranks' plans. Raises ValueError unless they are tensors, whole, and the same on all ranks."""
    found: dict[str, Entry] = {}
    chunks: dict[str, dict[tuple[int, ...], tuple[Any, Any, str]]] = {}
    for rank, plan in enumerate(plans):
        file = f"__{rank}_0.distcp"
        for item in plan.items:
            name, data = item.index.fqn, item.tensor_data
            if data is None:
                raise ValueError(f"{name} is no tensor, and only tensors are saved")
            entry = Entry(list(data.size), str(data.properties.dtype)[6:], [])
            check_present({name: found.setdefault(name, entry)}, {name: entry}, file)
            box = chunks.setdefault(name, {}).setdefault(tuple(data.chunk.offsets), (*_box(data.chunk), file))
            if box[:2] != _box(data.chunk):
                raise ValueError(f"{name} has chunks of {box[1]} and {_box(data.chunk)[1]} at {box[0]} in {box[2]} and {file}")
    for name, entry in found.items():
        check_cover(name, entry.shape, chunks[name].values())
    return found


def _box(chunk: Any) -> tuple[list[int], list[int]]:
    return list(chunk.offsets), list(chunk.sizes)


class _Writer(dcp.FileSystemWriter):
    """Writes this rank's shards and notes the digests of their records, which are computed while the disk takes them."""

    digests: Digests = {}
    places: Places = {}  # of all ranks' records, on rank 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Raises OSError where the disk refuses."""
        self.sync_files = False
        try:
            with _without_crc32():
                done = super().write_data(plan, planner)
        except RuntimeError as error:
            raise _refusal(error) or error from None
        self.sync_files = True  # for `.metadata`, which is still to come
        places = [result.storage_data for result in done.value()]
        with ThreadPoolExecutor(1) as pool:
            synced = pool.map(fsync_file, sorted({Path(self.path, place.relative_path) for place in places}))
            found = in_threads(lambda p: hash_record(Path(self.path, p.relative_path), p.offset, p.length), places)
            self.digests = {(p.relative_path, p.offset): sha256 for p, sha256 in zip(places, found, strict=True)}
            list(synced)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write torch's index. Its own copy of it is not always the one that `dcp.save` returns."""
        self.places = {result.index: result.storage_data for written in results for result in written}
        super().finish(metadata, results)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Archives without a second checksum of every byte, beside the SHA-256 of the manifest."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _refusal(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: closing an archive on a full disk, torch raises another one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _save_shards(tensors: dict[str, Any], writer: _Writer, planner: SavePlanner, group: Group) -> Metadata:
    """dcp.save, with the error of whichever rank had one instead of torch's own exception, which is not an Exception."""
    try:
        return dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except dcp.api.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError | UserError):
                raise failure from error
        raise RuntimeError(str(error)) from error


def _entries(index: Metadata, places: Places, digests: Digests) -> dict[str, Entry]:
    """What the manifest says of the tensors that torch's index lists."""
    found = {}
    for name, tensor in index.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # as planned
        chunks = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            record = (place.relative_path, place.offset, place.length)
            chunks.append(Chunk(*_box(chunk), *record, digests[record[:2]]))
        found[name] = Entry(list(tensor.size), str(tensor.properties.dtype)[6:], chunks)
    return found


def _prepare(work: Path) -> None:
    clean(work.parent)
    work.mkdir(parents=True)
    fsync_folder(work.parent.parent)


def _publish(work: Path, final: Path, files: dict[str, bytes], state: dict[str, Any], tensors: dict[str, Entry]) -> None:
    """Add what rank 0 writes, the manifest last, and give the folder its final name."""
    for name, content in files.items():
        write_atomically(work / name, content)
    state["files"] = {path.name: file_entry(path) for path in sorted(work.iterdir())}
    state["tensors"] = {name: entry._asdict() for name, entry in tensors.items()}
    write_atomically(work / MANIFEST_FILE, seal(state))
    if final.exists():  # damaged by hand, or a run that went back and came here again
        _delete(final)
    os.rename(work, final)
    fsync_folder(final.parent)


def clean(folder: Path) -> None:
    """Delete what killed saves and deletions have left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint that nobody may ever see half of."""
    hidden = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def load(path: Path, tensors: dict[str, Any], unread: Collection[str] = ()) -> Manifest:
    """Fill `tensors` in place from the checkpoint at `path` and return its manifest, on all ranks.

    `unread`: names of tensors of the checkpoint that nothing needs to ask for. Raises UserError where a byte of it has changed, a
    tensor is not whole, or the sections asked for are not the model's.
    """
    manifest = read_manifest(path)
    reader = CheckpointReader(path, manifest["tensors"])
    wanted = {name: entry for name, entry in manifest["tensors"].items() if name not in unread}
    try:
        dcp.load(tensors, storage_reader=reader, planner=TensorPlanner(wanted))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        cause = next((failure for failure, _ in getattr(error, "failures", {}).values()), error)  # of those of all ranks
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(
            f"{path}: cannot be loaded into this model: {_reason(cause)}; use another checkpoint, or the model that it is of"
        ) from error
    return manifest


def room(manifest: Manifest, section: str, wanted: Callable[[str], bool]) -> dict[str, dict[str, Tensor]]:
    """`section` with empty tensors, as stored, for those whose names in it are wanted: what `load` fills. Nothing where there are none.

    For state whose names and shapes depend on what was saved.
    """
    there = [(name.partition("."), entry) for name, entry in manifest["tensors"].items()]
    found = {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for (head, _, name), entry in there
        if head == section and wanted(name)
    }
    return {section: found} if found else {}


def _reason(error: BaseException) -> str:
    """One line for an exception."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:400]}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. What has a checkpoint's name was complete once: what is missing there is damage."""
    found = folder.glob(f"{PREFIX}*") if os.path.isdir(folder) else []
    return sorted((p for p in found if p.name[len(PREFIX) :].isdecimal() and p.is_dir()), key=step_of)


def keep(folder: Path, last: int, every: int) -> None:
    """Delete all checkpoints but the newest `last` and those of steps that `every` divides (0 = none)."""
    for path in checkpoints(folder)[:-last]:
        if not every or step_of(path) % every:
            _delete(path)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name[len(PREFIX) :])


def find(path: Path) -> Path:
    """A checkpoint from the path of one, or of a run folder (its newest)."""
    if any(os.path.isfile(path / name) for name in (MANIFEST_FILE, INDEX_FILE)):
        return path
    if found := checkpoints(path / "checkpoints"):
        return found[-1]
    raise UserError(f"{path}: neither a checkpoint nor a run folder with one; train first, or give another path")
