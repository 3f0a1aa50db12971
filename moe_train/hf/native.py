"""Checkpoints in one process: opening one as config, tensors one at a time and the decoder that they make (fp32, CPU); writing one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import get_backend
from moe_train.checkpoint import dcp
from moe_train.checkpoint.logical import LogicalTensor, logical_tensors
from moe_train.checkpoint.manifest import read_manifest
from moe_train.cli import dump, load_run, merge, parse
from moe_train.config import Config
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE, PLAIN, TOKENIZER_FILE, require_language_model
from moe_train.hf.folders import whole_folder
from moe_train.model.attention import find_segments
from moe_train.model.decoder import Decoder
from moe_train.model.routing import BatchInfo
from moe_train.parallel.mesh import start_world

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Native:
    """An opened checkpoint, of which no tensor is in memory."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    step: int

    @property
    def tensors(self) -> dict[str, LogicalTensor]:
        """Parameters and router buffers by the names that `Decoder.state_dict()` has."""
        return {tensor.name: tensor for tensor in logical_tensors(self.path)}

    def build(self) -> Decoder:
        """The decoder with its weights. Raises UserError where they are not those of the config, which may have been overridden."""
        tensors = self.tensors
        there = {name: list(tensor.shape) for name, tensor in tensors.items()}
        wanted = {name: list(value.shape) for name, value in empty_decoder(self.config).state_dict().items()}
        if differ := [name for name in there | wanted if there.get(name) != wanted.get(name)]:
            first = differ[0]
            rule = (
                f"{first} is {there.get(first, 'not there')}, and {wanted.get(first, 'not there')} in the model of the config"
            )
            raise UserError(f"{self.path}: {rule}; leave out the keys of model that it was not trained with")
        return build(self.config, lambda name: tensors[name].load())


def open_native(path: Path, overrides: Iterable[str] = ()) -> Native:
    """Open the checkpoint at `path`, or the newest of the run there. Raises UserError where it is not complete."""
    path = dcp.find(path)
    step = read_manifest(path)["step"]
    config = load_run(path / CONFIG_FILE, [*PLAIN, "train.device=cpu", "train.dtype=fp32", *overrides])
    require_language_model(config, path)
    return Native(path, config, load_tokenizer(path / TOKENIZER_FILE), step)


def empty_decoder(config: Config) -> Decoder:
    """The decoder with shapes and no memory."""
    with torch.device("meta"):
        return Decoder(config.model, get_backend("torch"))


def build(config: Config, load: Callable[[str], Tensor]) -> Decoder:
    """The decoder of `config` in evaluation mode with the tensors that `load` gives for their names."""
    model = empty_decoder(config)
    values = {name: load(name) for name in model.state_dict()}
    model.load_state_dict(values, assign=True)
    return model.eval()


@torch.no_grad()
def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    """tokens [B, S], a document in each row -> logits [B, S, V]."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    zeros = torch.zeros_like(tokens)
    rows = torch.arange(len(tokens))
    logits = model(BatchInfo(tokens, positions, zeros, zeros, rows, find_segments(zeros, CPU, torch.float32))).logits
    assert logits is not None
    return logits


def new_config(content: dict[str, Any], tokenizer: Tokenizer, out: Path) -> Config:
    """The config of a checkpoint that will be `out`: `content`, its tokenizer, and that a run starts from it.

    Raises UserError where a rule is broken.
    """
    named = ByteTokenizer.name if isinstance(tokenizer, ByteTokenizer) else str(out.absolute() / TOKENIZER_FILE)
    added = {"run": {"dir": None}, "data": {"tokenizer": named}, "checkpoint": {"init_from": str(out.absolute())}}
    return parse(merge(content, added), str(out))


@contextmanager
def whole_checkpoint(out: Path, config: Config, tokenizer: Tokenizer, make: Callable[[], Decoder]) -> Iterator[Path]:
    """Write what `make` gives as a checkpoint of step 0, and give its path for checks; it becomes `out` when the block ends well."""
    start_world(Config.model_validate({"train": {"device": "cpu"}}))
    with whole_folder(out) as work:
        tokenizer.save(work / TOKENIZER_FILE)
        files = {CONFIG_FILE: dump(config).encode(), TOKENIZER_FILE: (work / TOKENIZER_FILE).read_bytes()}
        (work / TOKENIZER_FILE).unlink()
        state = {"config": config.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint}
        written = dcp.save(work, 0, {"model": make().state_dict()}, state, files)
        yield written
        for file in written.iterdir():
            file.rename(work / file.name)
        written.rmdir()
