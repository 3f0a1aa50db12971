"""The tensors of a checkpoint as the model knows them, whatever layout wrote them: one process, one tensor in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import DTYPES, Entry, read_manifest
from moe_train.checkpoint.records import read_record


@dataclass(frozen=True)
class LogicalTensor:
    """A whole tensor of a checkpoint, not read yet."""

    path: Path
    section: str
    name: str  # inside its section: layers.0.mlp.router.weight
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.entry.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return DTYPES[self.entry.dtype]

    def load(self) -> Tensor:
        """Read it, [shape] on the CPU, from all of its chunks. Raises UserError naming tensor and file where one is damaged."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.entry.chunks:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = read_record(self.path, f"{self.section}.{self.name}", chunk, self.dtype)
        return whole


def logical_tensors(path: Path, section: str = "model") -> Iterator[LogicalTensor]:
    """Iterate over the tensors of one section of checkpoint `path` (a `step-` folder; `dcp.find` gives a run's newest), by name.

    Works in one process without torch.distributed and without building the model, on a checkpoint of any layout: shapes are those of
    the whole tensors. `section`: `model` (parameters and router buffers, as `Decoder.state_dict()` names them) or `optimizer`
    (`state.NAME.exp_avg`, ...). Only `load()` reads a tensor, so that one at a time is in memory; it compares what it reads with the
    manifest's SHA-256. Raises UserError where the checkpoint is not complete, or a tensor in it is not whole.
    """
    for full, entry in sorted(read_manifest(path)["tensors"].items()):
        head, _, name = full.partition(".")
        if head == section:
            yield LogicalTensor(path, section, name, entry)
