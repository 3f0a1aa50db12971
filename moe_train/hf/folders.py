"""A folder that appears whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.errors import UserError
from moe_train.files import cannot_write, fsync_folder


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which gets its name when the block ends well and is deleted when it does not.

    Raises UserError where `out` is there already, or the disk refuses.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; choose another folder, or remove it")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise cannot_write(out, error, "OUT") from error
    try:
        yield work
        work.chmod(0o755)
        os.rename(work, out)
    except Exception as error:
        if (refused := _refusal(error)) is None:
            raise
        raise cannot_write(out, refused, "OUT") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    fsync_folder(out.absolute().parent)


def _refusal(error: Exception) -> OSError | None:
    """What the disk said, if an error is the disk's: safetensors and tokenizers, written in Rust, have errors of their own."""
    if isinstance(error, OSError):
        return None if error.errno is None else error  # a library's own has none
    said = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(said[1]), os.strerror(int(said[1]))) if said else None
