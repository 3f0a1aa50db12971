"""Looking at checkpoints without a model and without torch.distributed: whether they are whole, and how two of them differ."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_train.checkpoint import dcp
from moe_train.checkpoint.logical import LogicalTensor, logical_tensors
from moe_train.checkpoint.manifest import MANIFEST_FILE, damaged, damaged_chunks, damaged_files, parse_manifest, read_manifest
from moe_train.errors import UserError

SECTIONS = ("model", "optimizer", "memory")
PIECE = 1 << 22  # numbers that are compared at a time


def found_in(path: Path) -> list[Path]:
    """The checkpoints at `path`: itself, or those of a run folder or of its `checkpoints`. Raises UserError where there is none."""
    if any((path / name).is_file() for name in (MANIFEST_FILE, dcp.INDEX_FILE)):
        return [path]
    if found := dcp.checkpoints(path / "checkpoints") or dcp.checkpoints(path):
        return found
    raise UserError(f"{path}: neither a checkpoint nor a folder with some; give another path")


def size_of(path: Path) -> int:
    """Bytes of the files in a checkpoint."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def problems(path: Path, content: bool = True) -> Iterator[str]:
    """What is wrong with the checkpoint at `path`, each in one line. `content`: read the shards too, not only their sizes."""
    try:
        manifest = parse_manifest(path)
    except UserError as error:
        yield str(error)
        return
    yield from (str(damaged(path, problem)) for problem in damaged_files(path, manifest))
    if content:
        chunks = [(name, chunk) for name, entry in manifest["tensors"].items() for chunk in entry.chunks]
        yield from (str(damaged(path, problem)) for problem in damaged_chunks(path, chunks))


def differences(one: Path, two: Path) -> Iterator[str]:
    """What differs between two checkpoints, a line each: step, config, tensors. At most one tensor of each is in memory."""
    a, b = read_manifest(one), read_manifest(two)
    if a["step"] != b["step"]:
        yield f"step: {a['step']} and {b['step']}"
    here, there = flat(a.get("config", {})), flat(b.get("config", {}))
    for key in sorted(here | there):
        if here.get(key, _Absent) != there.get(key, _Absent):
            yield f"config: {key}: {_shown(here, key)} and {_shown(there, key)}"
    if a.get("tokenizer") != b.get("tokenizer"):
        yield f"tokenizer: {a.get('tokenizer')} and {b.get('tokenizer')}"
    for section in SECTIONS:
        yield from _tensor_differences(one, two, section)


class _Absent:
    """What a key has that is not there."""


def _shown(keys: dict[str, Any], key: str) -> str:
    return repr(keys[key]) if key in keys else "not there"


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of nested mappings with their whole path."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _tensor_differences(one: Path, two: Path, section: str) -> Iterator[str]:
    ours, theirs = ({tensor.name: tensor for tensor in logical_tensors(path, section)} for path in (one, two))
    for name in sorted(ours | theirs):
        a, b = ours.get(name), theirs.get(name)
        full = f"{section}.{name}"
        if a is None or b is None:
            yield f"{full}: only in {two if a is None else one}"
        elif a.entry[:2] != b.entry[:2]:
            yield f"{full}: {a.entry} and {b.entry}"
        elif (largest := largest_difference(a, b)) != 0.0:
            yield f"{full}: largest difference {largest:.3e}"


def largest_difference(a: LogicalTensor, b: LogicalTensor) -> float:
    """max |a - b| of two tensors of one shape, in fp64; inf where one of them is not finite and the other is another value."""
    x, y = a.load().flatten(), b.load().flatten()
    largest = 0.0
    for start in range(0, x.numel(), PIECE):
        p, q = (values[start : start + PIECE].double() for values in (x, y))
        apart = (p - q).abs()
        apart[(p == q) | (p.isnan() & q.isnan())] = 0.0
        largest = max(largest, float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return largest
