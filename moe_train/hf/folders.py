"""A folder that appears whole or not at all."""

import os
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
        raise cannot_write(out, error) from error
    try:
        yield work
        work.chmod(0o755)
        os.rename(work, out)
    except OSError as error:
        if error.errno is None:  # a library's own, which is not the disk's
            raise
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    fsync_folder(out.absolute().parent)
