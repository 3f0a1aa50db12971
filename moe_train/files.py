"""Writing files so that nobody ever sees half of one under its final name, and what to say where they cannot be written."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from moe_train.errors import UserError

LEFTOVER = f".*.{'[0-9a-f]' * 12}.tmp"  # what a process that was killed in write_atomically leaves, as Path.glob knows it


def temporary_beside(path: str | os.PathLike[str]) -> Path:
    """Create an empty file of a unique name in the folder of `path`, so that a rename to `path` stays on one file system."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(6)}.tmp")
    temporary.open("xb").close()
    return temporary


def fsync_folder(folder: Path) -> None:
    """Make the renames in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fsync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file under a temporary name, then rename it."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(Path(path).parent)


def cannot_write(path: Path, error: OSError, other: str = "run.dir") -> UserError:
    """What to tell a user whose disk refuses a write at or below `path`; `other`: of what another one can be chosen."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = f"{shutil.disk_usage(there).free / 1e6:.1f} MB are free"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = (
        "make room, and the same command goes on"
        if full
        else f"make it a folder that can be written, or choose another {other}"
    )
    return UserError(f"{path}: cannot be written: {error.strerror or error}; {free}; {remedy}")
