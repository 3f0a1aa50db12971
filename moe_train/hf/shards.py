"""safetensors files with an index, written while their tensors come one at a time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from moe_train.errors import UserError

NAME = "model.safetensors"
INDEX = f"{NAME}.index.json"
SMALLEST, LARGEST = 64 * 2**20, 2 * 2**30  # bytes of a shard


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], total: int) -> None:
    """Write tensors of `total` bytes as `model.safetensors`, or as shards beside an index.

    A shard is in memory twice while it is written, so it has at most an eighth of the model.
    """
    limit = min(max(total // 8, SMALLEST), LARGEST)
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    size = written = 0

    def flush() -> None:
        nonlocal size, written
        safetensors.torch.save_file(held, folder / _part(len(files)), metadata={"format": "pt"})
        (folder / _part(len(files))).chmod(0o644)  # it was made for its owner alone
        files.append(list(held))
        held.clear()
        written, size = written + size, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            flush()
        held[name] = tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()
        size += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / _part(0)).rename(folder / NAME)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _part(number: int) -> str:
    return f".part-{number}"


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a model: those of the index, or the one without. Raises UserError where there are none."""
    if not (folder / INDEX).is_file():
        if (folder / NAME).is_file():
            return [folder / NAME]
        rule = "other weights are pickles, which run code: convert them first"
        raise UserError(f"{folder}: has neither {NAME} nor {INDEX}; {rule}")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if all(Path(name).name == name and name.endswith(".safetensors") for name in names):
            return [folder / name for name in sorted(names)]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        pass
    raise UserError(f"{folder / INDEX}: is no index of safetensors files in this folder; use another copy")


def find_tensors(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor in a folder of safetensors files."""
    found: dict[str, Path] = {}
    for file in tensor_files(folder):
        with _opened(file) as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a folder of safetensors files."""
    found: dict[str, list[int]] = {}
    for file in tensor_files(folder):
        with _opened(file) as opened:
            found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return found


def read_tensor(name: str, file: Path) -> Tensor:
    """One tensor of a file, on the CPU."""
    with _opened(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _opened(file: Path) -> Any:
    """A file of tensors. Raises UserError where it is none, or damaged."""
    try:
        return safetensors.safe_open(file, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}; use another copy") from None
