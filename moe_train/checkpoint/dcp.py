"""Checkpoints: torch.distributed.checkpoint shards in a folder that appears whole or not at all.

`step-00000100/` holds the shards, `.metadata`, `config.yaml`, `tokenizer`, `rng.safetensors` and `state.json`: step, loader cursor,
size and SHA-256 of every other file, and the SHA-256 of all that. It is written under a temporary name, synced, and renamed last, so
that a folder with the final name is complete; `load` notices every byte that changed later.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from moe_train.checkpoint.reader import INDEX_FILE, CheckpointReader, TensorPlanner
from moe_train.errors import UserError
from moe_train.files import cannot_write, fsync_folder, write_atomically

PREFIX = "step-"
TEMPORARY = ".tmp-"
STATE_FILE = "state.json"
SHARDS = "*.distcp"

Digests = dict[str, dict[str, Any]]  # file name -> bytes, sha256
_DIGEST = {"bytes", "sha256"}


def save(folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], files: dict[str, bytes]) -> Path:
    """Write the checkpoint of `step` into `folder` from all ranks. `files`: further files of rank 0, name -> content.

    Raises UserError on every rank where the disk refuses; the checkpoints that were there stay, and nothing half-written does.
    """
    final = folder / f"{PREFIX}{step:08d}"
    work = folder / f"{TEMPORARY}{final.name}"
    try:
        on_main(lambda: _prepare(work))
        writer = _Writer(work, sync_files=True)
        _save_shards(tensors, writer)
        digests: list[Digests] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(digests, writer.digests)
        shards = {name: digest for part in digests for name, digest in part.items()}
        on_main(lambda: _publish(work, final, files, {"step": step, **state}, shards))
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise cannot_write(folder, error) from error
    return final


def on_main(write: Callable[[], None]) -> None:
    """Run `write` on rank 0 while the others wait. An OSError there is raised on every rank, so that none waits for ever."""
    refused: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            refused = [error]
    dist.broadcast_object_list(refused)
    if refused[0] is not None:
        raise refused[0]


class _Writer(dcp.FileSystemWriter):
    """Writes this rank's shards and notes their digests."""

    digests: Digests = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        try:
            done = super().write_data(plan, planner)
        except RuntimeError as error:
            raise _refusal(error) or error from None
        self.digests = {path.name: _digest(path) for path in Path(self.path).glob(f"{plan.storage_data.prefix}{SHARDS}")}
        return done


def _refusal(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: closing an archive on a full disk, torch raises another one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _save_shards(tensors: dict[str, Any], writer: _Writer) -> None:
    """dcp.save, with the OSError of whichever rank had one instead of torch's own exception, which is not an Exception."""
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from error
        raise RuntimeError(str(error)) from error


def _prepare(work: Path) -> None:
    clean(work.parent)
    work.mkdir(parents=True)
    fsync_folder(work.parent.parent)


def _publish(work: Path, final: Path, files: dict[str, bytes], state: dict[str, Any], shards: Digests) -> None:
    """Add what rank 0 writes, state.json last, and give the folder its final name."""
    for name, content in files.items():
        write_atomically(work / name, content)
    own = {path.name: _digest(path) for path in sorted(work.iterdir()) if path.name not in shards}
    state = {**state, "files": own | shards}
    write_atomically(work / STATE_FILE, json.dumps({**state, "sha256": _seal(state)}).encode())
    if final.exists():  # damaged by hand, or a run that went back and came here again
        _delete(final)
    os.rename(work, final)
    fsync_folder(final.parent)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal(state: dict[str, Any]) -> str:
    """The SHA-256 of a state as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def clean(folder: Path) -> None:
    """Delete what killed saves and deletions have left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint that nobody may ever see half of."""
    hidden = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path` and return its state. Raises UserError where it is damaged."""
    state = read_state(path)
    _check_shards(path, state["files"])
    reader = CheckpointReader(path, {name: said["bytes"] for name, said in state["files"].items()})
    try:
        dcp.load(tensors, storage_reader=reader, planner=TensorPlanner())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        raise UserError(
            f"{path}: cannot be loaded into this model: {_reason(error)}; use another checkpoint, or the model that it is of"
        ) from error
    return state


def _reason(error: BaseException) -> str:
    """One line for an exception of dcp.load, which holds those of the ranks."""
    cause = next((failure for failure, _ in getattr(error, "failures", {}).values()), error)
    if isinstance(cause, pickle.UnpicklingError):  # torch's own text advises to unpickle without limits
        return "a shard is damaged, or holds something that is no tensor"
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no reason given'])[0][:400]}"


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint: step, loader cursor. Reads every file but the shards, of which it checks the size.

    Raises UserError where a file is missing or not as it was written.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        seal = state.pop("sha256", None) if isinstance(state, dict) else None
        whole = seal == _seal(state)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"not a complete checkpoint: {STATE_FILE}: {error}") from None
    if not whole:
        raise _damaged(path, f"{STATE_FILE} does not have the SHA-256 that it names")
    _check_state(path, state)
    for name, said in state["files"].items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != said["bytes"]:
            raise _damaged(path, f"{name} has {there} of {said['bytes']} bytes")
        if not file.match(SHARDS) and _digest(file) != said:
            raise _damaged(path, f"{name} does not have the SHA-256 that it was saved with")
    return state


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Raise UserError unless a state has the step that the folder is named after, and a digest of files in the folder."""
    step, files = state.get("step"), state.get("files")
    named = path.name.removeprefix(PREFIX)
    if type(step) is not int or step < 0 or (path.name.startswith(PREFIX) and named != f"{step:08d}"):
        raise _damaged(path, f"{STATE_FILE} says step={step!r}, which must be the number in the folder's name")
    if not isinstance(files, dict) or not all(_is_digest(name, said) for name, said in files.items()):
        raise _damaged(path, f"{STATE_FILE} has no bytes and sha256 of each file in the folder")


def _is_digest(name: str, said: Any) -> bool:
    return Path(name).name == name and isinstance(said, dict) and type(said.get("bytes")) is int and said.keys() == _DIGEST


def _check_shards(path: Path, files: Digests) -> None:
    """Compare the shards with their digests, each of them on one rank."""
    shards = sorted(name for name in files if Path(name).match(SHARDS))
    mine = shards[dist.get_rank() :: dist.get_world_size()]
    wrong = [name for name in mine if _digest(path / name) != files[name]]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, wrong)
    if names := [name for part in found for name in part]:
        raise _damaged(path, f"{names[0]} does not have the SHA-256 that it was saved with")


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path}: damaged: {problem}; use another checkpoint, or remove this one: a run goes on from the one before"
    )


def complete(path: Path) -> bool:
    """Whether `path` is a finished checkpoint."""
    return os.path.isfile(path / INDEX_FILE) and os.path.isfile(path / STATE_FILE)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    found = folder.glob(f"{PREFIX}*") if os.path.isdir(folder) else []
    return sorted((p for p in found if p.name[len(PREFIX) :].isdecimal() and complete(p)), key=step_of)


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
    if complete(path):
        return path
    if found := checkpoints(path / "checkpoints"):
        return found[-1]
    raise UserError(f"{path}: neither a checkpoint nor a run folder with one; train first, or give another path")
