"""Checkpoints: torch.distributed.checkpoint shards in a folder that appears whole or not at all.

`step-00000100/` holds the shards, `.metadata`, `config.yaml` and `state.json` (step, loader cursor). It is written under a temporary
name, synced, and renamed last, so that a folder with the final name is complete.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from moe_train.errors import UserError
from moe_train.files import fsync_folder, write_atomically

PREFIX = "step-"
STATE_FILE = "state.json"


def save(folder: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], files: dict[str, bytes]) -> Path:
    """Write the checkpoint of `step` into `folder` from all ranks. `files`: further files, name -> content."""
    final = folder / f"{PREFIX}{step:08d}"
    work = folder / f".tmp-{final.name}"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(work, sync_files=True))
    if main:
        for name, content in files.items():
            write_atomically(work / name, content)
        sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        write_atomically(work / STATE_FILE, json.dumps({"step": step, "files": sizes, **state}).encode())
        if final.exists():  # a run that went back and came here again
            shutil.rmtree(final)
        os.rename(work, final)
        fsync_folder(folder)
    dist.barrier()
    return final


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path` and return its state. Raises UserError where it is damaged."""
    state = read_state(path)
    try:
        dcp.load(tensors, checkpoint_id=str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1][:400]  # the lines before are a traceback
        raise UserError(f"{path}: cannot be loaded into this model: {type(error).__name__}: {reason}") from error
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint: step, loader cursor. Raises UserError where a file is missing or truncated."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a complete checkpoint: state.json: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or not isinstance(state.get("files"), dict):
        raise UserError(f"{path}: not a complete checkpoint: state.json has no step or no files")
    for name, size in state["files"].items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            raise UserError(f"{path}: damaged: {name} has {there} of {size} bytes; use another checkpoint")
    return state


def complete(path: Path) -> bool:
    """Whether `path` is a finished checkpoint."""
    return (path / ".metadata").is_file() and (path / STATE_FILE).is_file()


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    found = folder.glob(f"{PREFIX}*") if folder.is_dir() else []
    return sorted(p for p in found if p.name[len(PREFIX) :].isdigit() and complete(p))


def keep(folder: Path, last: int, every: int) -> None:
    """Delete all checkpoints but the newest `last` and those of steps that `every` divides (0 = none)."""
    for path in checkpoints(folder)[:-last]:
        if not every or step_of(path) % every:
            shutil.rmtree(path)


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
