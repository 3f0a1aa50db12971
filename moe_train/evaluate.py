"""Bits per byte of a model on held-out text, and opening a trained model from its checkpoint."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moe_train.checkpoint import dcp
from moe_train.checkpoint.manifest import read_manifest
from moe_train.cli import load_run
from moe_train.config import Config, Conflict
from moe_train.data.indexed import beside
from moe_train.data.loader import EvalRows, MicroBatch
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.engine.base import Sums
from moe_train.engine.native import Model
from moe_train.errors import UserError
from moe_train.model.transformer_xl import Memory
from moe_train.parallel.mesh import World, data_place, start_world

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer"
_AXES = ("dp_replicate", "tp", "pp", "cp", "ep", "expert_tp")
# A checkpoint opens on whatever is here, not in the layout that it was trained in.
PLAIN = [
    "train.device=auto",
    "train.dtype=auto",
    "parallel.dp_shard=auto",
    "parallel.pp_layers=null",
    *(f"parallel.{a}=1" for a in _AXES),
]


@dataclass(frozen=True)
class Restored:
    """A trained model, ready to run."""

    config: Config
    world: World
    model: Model
    tokenizer: Tokenizer
    step: int
    path: Path


def restore(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Restored:
    """Open the checkpoint at `path`, or the newest of the run there, on this machine's device and ranks."""
    path = dcp.find(path)
    read_manifest(path)  # a damaged checkpoint is named as such before its config is read
    config = load_run(path / CONFIG_FILE, [*PLAIN, *overrides])
    world = start_world(config)
    model = Model(config, world).materialise()
    state = {"model": model.state_dict()}
    step = dcp.load(path, state)["step"]
    model.load_state_dict(state["model"])
    return Restored(config, world, model, load_tokenizer(path / TOKENIZER_FILE), step, path)


def report(sums: Sums) -> dict[str, float]:
    """Mean nats per token, perplexity per token, and bits per byte of text."""
    nats = sums.nats / max(sums.targets, 1)
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": sums.nats / math.log(2) / max(sums.bytes, 1),
        "tokens": sums.targets,
        "bytes": sums.bytes,
    }


def byte_lengths(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text behind each id, int64 [vocabulary]."""
    return torch.from_numpy(tokenizer.byte_lengths())


def joined(microbatches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """The same rows, but where a document goes on from a row to the same row of the next micro-batch, so do its positions."""
    before: Tensor | int = 0
    for micro in microbatches:
        goes_on = micro.doc_ids == micro.doc_ids[:, :1]
        micro = replace(micro, positions=micro.positions + goes_on * before)
        yield micro
        before = torch.where(micro.targets[:, -1:] >= 0, micro.positions[:, -1:] + 1, 0)


def check_memory(config: Config, ranks: int) -> None:
    """Raise UserError with every reason why this run's model cannot be evaluated with memory on so many data-parallel ranks."""
    model, found = config.model, []
    if model.block != "transformer_xl":
        rule = "only blocks of transformer_xl see hidden rows of earlier columns"
        found.append(Conflict("model.block", model.block, rule, "evaluate without --memory"))
    elif model.transformer_xl.attn_type == "absolute":
        rule = "positions that are added to embeddings do not go on from row to row"
        found.append(Conflict("model.transformer_xl.attn_type", "absolute", rule, "evaluate without --memory"))
    if not config.data.mask_documents:
        rule = "with memory a row sees back to the start of its document"
        found.append(Conflict("data.mask_documents", False, rule, "set it to true, or evaluate without --memory"))
    if ranks > 1:
        rule = "with memory rows are evaluated one after the other"
        found.append(Conflict("world size", ranks, rule, "use one process, or evaluate without --memory"))
    if found:
        raise UserError("\n  ".join(map(str, found)))


def evaluate_on(restored: Restored, data: str, scratch: Path, memory: int = 0) -> dict[str, float]:
    """`report` on a prepared corpus (its prefix) or on a text file, which is encoded into `scratch`; every token counts.

    With `memory` each layer also sees its last so many hidden rows of the rows before (segment-level recurrence); it raises
    UserError where that is impossible.
    """
    config, world = restored.config, restored.world
    prefix = data
    if not os.path.exists(beside(data, ".idx")):
        prefix = str(_encode(Path(data), restored.tokenizer, scratch))
    rank, size = data_place(config.parallel, world)
    if memory:
        check_memory(config, size)
    rows = EvalRows(
        prefix,
        seq_len=config.train.seq_len,
        micro_batch_size=1 if memory else config.train.micro_batch_size,
        dp_rank=rank,
        dp_size=size,
        vocab_size=config.model.vocab_size,
        tokenizer=restored.tokenizer,
    )
    lengths = byte_lengths(restored.tokenizer)
    if memory:
        return report(restored.model.evaluate(joined(rows), lengths, Memory.start(1, memory, world.device)))
    return report(restored.model.evaluate(rows, lengths))


def _encode(path: Path, tokenizer: Tokenizer, scratch: Path) -> Path:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: neither a prepared corpus (no {beside(path, '.idx')}) nor a text file: {error}") from None
    with DatasetWriter(scratch / "text", tokenizer) as writer:
        writer.add_text(text)
    return scratch / "text"
