"""What the rows of a step leave to those of the next (segment-level recurrence: Transformer-XL, arXiv 1901.02860, section 3.2).

With `data.order: contiguous`, micro-batch i of a rank has rows of the same streams in every step, and each row goes on where that of
the step before has ended. So there is a `Memory` for each i: an argument of its forward in one step, and a result, which is the
argument in the next. An engine owns them; modules keep nothing.

A checkpoint has them by stream, `memory.STREAM.before` and `memory.STREAM.layers.LAYER...`, so that ranks and micro-batches may change.

Shapes: B rows of a micro-batch, n columns kept.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import KeyPath, keystr, tree_flatten_with_path, tree_map_with_path

from moe_train.config import Config
from moe_train.data.loader import MicroBatch
from moe_train.errors import UserError
from moe_train.model.transformer_xl import Memory
from moe_train.parallel.mesh import World, data_place


def streams_here(config: Config, world: World) -> list[range]:
    """The streams whose rows each micro-batch of this rank has, as the loader deals them."""
    rank, ranks = data_place(config.parallel, world)
    rows = config.train.micro_batch_size
    return [range(first, first + rows) for first in range(rank * rows, config.train.global_batch_size, ranks * rows)]


def start(config: Config, world: World) -> list[Memory]:
    """Empty memories of this rank's micro-batches; none where `train.memory` is 0."""
    most = config.train.memory
    return [Memory.start(len(rows), most, world.device) for rows in streams_here(config, world)] if most else []


def go_on(micro: MicroBatch, memory: Memory) -> tuple[MicroBatch, Memory]:
    """The micro-batch with positions that count on from the rows before, and what to give its forward."""
    positions, memory = memory.go_on(micro.positions, micro.doc_ids, micro.targets)
    return replace(micro, positions=positions), memory


def by_stream(memories: Sequence[Memory], streams: Sequence[range]) -> dict[str, Tensor]:
    """What is kept of each stream, as a checkpoint names it."""
    return {
        f"{stream}.{name}": kept[i]
        for memory, part in zip(memories, streams, strict=True)
        for name, kept in _tensors(memory).items()
        for i, stream in enumerate(part)
    }


def row_shapes(memory: Memory) -> dict[str, Tensor]:
    """What is kept of one row, by name, on meta."""
    return {name: kept[0].to("meta") for name, kept in _tensors(memory).items()}


def restore(state: Mapping[str, Tensor], streams: Sequence[range], like: Memory) -> list[Memory]:
    """The memories of micro-batches with these streams from what `by_stream` gave, cut to the columns that `like` keeps at most.

    `like`: what the same model keeps of any B rows after a forward, for its structure. Raises UserError where `state` holds anything
    else than such a model keeps.
    """
    length = next((kept.shape[0] for name, kept in state.items() if ".seen." in name), 0)
    shapes = {name: _saved_shape(name, kept, length) for name, kept in _tensors(like).items()}
    wanted = {f"{stream}.{name}": shape for part in streams for stream in part for name, shape in shapes.items()}
    if wanted != {name: kept.shape for name, kept in state.items()}:
        rule = "the checkpoint's memory is not what this model keeps of its streams"
        raise UserError(f"train.memory={like.most}: {rule}; set train.memory=0, or use another checkpoint")
    return [
        _filled(like, {name: [state[f"{stream}.{name}"] for stream in part] for name in shapes}, length) for part in streams
    ]


def _saved_shape(name: str, kept: Tensor, length: int) -> torch.Size:
    """Of one row of `kept`, where `length` columns were saved."""
    return torch.Size([length, *kept.shape[2:]]) if ".seen." in name else kept.shape[1:]


def _filled(like: Memory, rows: dict[str, list[Tensor]], length: int) -> Memory:
    """`like` with `length` columns of these rows instead of its own."""

    def fill(path: KeyPath, kept: Tensor | None) -> Tensor | None:
        return None if kept is None else torch.stack(rows[_name(path)]).to(kept)

    content = tree_map_with_path(fill, _content(like))
    return replace(like, length=length, before=content["before"]).extend(0, content["layers"])


def _tensors(memory: Memory) -> dict[str, Tensor]:
    """Everything that is kept, [B, ...] each, by name."""
    leaves, _ = tree_flatten_with_path(_content(memory))
    return {_name(path): kept for path, kept in leaves if kept is not None}


def _content(memory: Memory) -> dict[str, Any]:
    return {"before": memory.before, "layers": memory.layers}


def _name(path: KeyPath) -> str:
    return ".".join(re.findall(r"\w+", keystr(path)))
