"""Reading the records of a checkpoint's shards: the one place where their bytes are compared and become tensors."""

from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from moe_train.checkpoint.manifest import Chunk, damage_of, damaged


def read_record(path: Path, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """The tensor in the record of a chunk of `name` in checkpoint `path`, [chunk.sizes] of `dtype` on the CPU.

    The bytes are hashed in blocks and then read again, from the system's copy of them, straight into the tensor. Raises UserError
    naming tensor and file where the record has changed, or holds something else.
    """
    if problem := damage_of(path, name, chunk):
        raise damaged(path, problem)
    what = f"{name}, {chunk}, in {chunk.file} holds"
    with (path / chunk.file).open("rb") as file:
        record = cast(IO[bytes], _create_file_view(file, chunk.start, chunk.bytes))
        try:
            part = torch.load(record, map_location="cpu", weights_only=True)
        except Exception as error:  # a forged record raises anything
            raise damaged(path, f"{what} no tensor: {type(error).__name__}") from None
    if not isinstance(part, Tensor) or list(part.shape) != chunk.sizes or part.dtype != dtype:
        raise damaged(path, f"{what} something else")
    return part
