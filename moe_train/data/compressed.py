"""Reading files that may be compressed: `.gz` with gzip, `.zst` with Zstandard (the extra [data] before Python 3.14)."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moe_train.errors import UserError

SUFFIXES = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_NO_TEXT = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"%PDF-": "a PDF"}
_REMEDY = {"gzip": "give it the suffix .gz", "zstd": "give it the suffix .zst"}


def is_compressed(path: Path) -> bool:
    """Say whether a file's name says that it is compressed."""
    return path.suffix.lower() in SUFFIXES


def inner_suffix(path: Path) -> str:
    """Return the suffix of what is in the file, in lower case: `.jsonl` for `x.jsonl.gz`."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading what is in it.

    Raises UserError, also from the reads inside the block, when it cannot be read, is cut or damaged, is compressed and not
    named so, or is no text by its first bytes.
    """
    try:
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: it is cut or damaged ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return _open_zstd(path)
    file = path.open("rb")
    start = file.read(8)
    file.seek(0)
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            file.close()
            raise UserError(f"{path} is compressed ({kind}); {_REMEDY.get(kind, 'unpack it first')}")
    for magic, kind in _NO_TEXT.items():
        if start.startswith(magic):
            file.close()
            raise UserError(f"{path} is {kind}, no text; convert it to .jsonl or .txt first")
    return file


@contextlib.contextmanager
def _open_zstd(path: Path) -> Iterator[BinaryIO]:
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(f"{path} needs the package backports.zstd: pip install 'moe_train[data]'") from None
    try:
        with zstd.open(path, "rb") as file:
            yield file
    except zstd.ZstdError as error:
        raise EOFError(str(error)) from None
