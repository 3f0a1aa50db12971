"""The tensors of a checkpoint as the model knows them, whatever layout wrote them: one process, one tensor in memory at a time."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint.manifest import DTYPES, Chunk, Entry, damaged, read_manifest, sha256_of


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
            whole[box] = self._read(chunk)
        return whole

    def _read(self, chunk: Chunk) -> Tensor:
        what = f"{self.section}.{self.name}, {chunk}, in {chunk.file}"
        with (self.path / chunk.file).open("rb") as file:
            file.seek(chunk.start)
            record = file.read(chunk.bytes)
        if sha256_of(record) != chunk.sha256:
            raise damaged(self.path, f"{what} does not have the SHA-256 that it was saved with")
        try:
            part = torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
        except Exception as error:  # a forged record raises anything
            raise damaged(self.path, f"{what} holds no tensor: {type(error).__name__}") from None
        if not isinstance(part, Tensor) or list(part.shape) != chunk.sizes or part.dtype != self.dtype:
            raise damaged(self.path, f"{what} holds something else")
        return part


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
