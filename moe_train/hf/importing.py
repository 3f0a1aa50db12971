"""A folder of transformers as a checkpoint, from which training goes on (`checkpoint.init_from`)."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.config import Config
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.hf.compare import TOLERANCE, Difference, compare, real_tokens, require_same, their_logits
from moe_train.hf.native import empty_decoder, logits_of, new_config, open_native, whole_checkpoint
from moe_train.hf.remote import PREFIX, check_exportable
from moe_train.hf.shards import find_tensors, read_shapes, read_tensor, tensor_files
from moe_train.hf.stock import Names, Stock, from_settings, names_of
from moe_train.hf.tokenizer_files import read_tokenizer
from moe_train.model.decoder import Decoder
from moe_train.model.init import Initial, draw


def from_hf(source: Path, out: Path, tokenizer: str | None = None, tolerance: float = TOLERANCE) -> Difference:
    """Import the folder `source`, one of a known architecture or one that `to_hf` wrote, as the checkpoint `out` of step 0.

    `tokenizer`: `bytes` or a file, where the folder's cannot be read. Returns how far the logits are from transformers'. Raises
    UserError, and writes nothing, where something has no counterpart here, or the logits differ by more than
    `tolerance` of the largest.
    """
    settings = read_settings(source)
    found = read_tokenizer(source, tokenizer)
    stock, config = read_config(settings, found, out)
    tokens = real_tokens(found, config.model.vocab_size or 0, config.train.seq_len)
    check_tensors(source, stock, config)
    theirs = their_logits(source, settings, tokens)
    gc.collect()
    with whole_checkpoint(out, config, found, lambda: read_tensors(source, stock, config)) as written:
        ours = logits_of(open_native(written).build(), tokens)
        difference = compare(ours, theirs)
        require_same(difference, f"{source} and its import", tolerance)
    return difference


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of a folder, with the defaults of its architecture. Raises UserError where there is none that can be read."""
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: cannot be read as the config.json of a model: {error}; give a folder of transformers"
        ) from None
    tensor_files(folder)
    if kind == "moe_train":
        return dict(settings)
    from transformers import AutoConfig

    try:
        return dict(AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict())
    except Exception as error:  # whatever transformers makes of a file that anybody may have written
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{file}: transformers cannot read it: {reason}; use another copy") from None


def read_config(settings: dict[str, Any], tokenizer: Tokenizer, out: Path) -> tuple[Stock | None, Config]:
    """The architecture (None: one of ours) and the run's config of the model that `settings` describe."""
    ours = settings["model_type"] == "moe_train"
    stock, model = (None, settings.get("model", {})) if ours else from_settings(settings)
    content = {"model": model, "train": {"seq_len": settings.get("max_position_embeddings")}}
    config = new_config(content, tokenizer, out)
    if ours:
        check_exportable(config.model)
    return stock, config


def check_tensors(folder: Path, stock: Stock | None, config: Config) -> None:
    """Raise UserError where a tensor of the model is missing in the folder, has another shape there, or is left over."""
    shapes = read_shapes(folder)
    for name, empty in empty_decoder(config).state_dict().items():
        for leaf, shape in _leaves(_names(stock, name, config), list(empty.shape)):
            found = shapes.pop(leaf, None)
            if found != shape:
                there = "no such tensor" if found is None else f"shape {found}"
                raise UserError(f"{folder}: {leaf} must have shape {shape}, and has {there}; import a whole model")
    if shapes:
        raise UserError(f"{folder}: {next(iter(shapes))} and {len(shapes) - 1} more tensors have no place in the model")


def read_tensors(folder: Path, stock: Stock | None, config: Config) -> Decoder:
    """The decoder with the folder's weights, which `check_tensors` has found to be those of the model."""
    files = find_tensors(folder)
    model = empty_decoder(config)
    values: dict[str, Tensor] = {}
    for name, empty in model.state_dict().items():
        names = _names(stock, name, config)
        value = _initial(model, name, config.run.seed) if names is None else _stack(names, files)
        values[name] = value.to(empty.dtype)
    model.load_state_dict(values, assign=True)
    return model


def _names(stock: Stock | None, name: str, config: Config) -> Names | None:
    return f"{PREFIX}.{name}" if stock is None else names_of(stock, name, config.model.num_experts)


def _leaves(names: Names | None, shape: list[int]) -> Iterator[tuple[str, list[int]]]:
    """The tensors that one of `shape` is stacked from, with their shapes."""
    if isinstance(names, str):
        yield names, shape
    for inner in names if isinstance(names, list) else []:
        yield from _leaves(inner, shape[1:])


def _stack(names: Names, files: dict[str, Path]) -> Tensor:
    """One of our tensors from the tensors of these names."""
    if isinstance(names, list):
        return torch.stack([_stack(inner, files) for inner in names])
    return read_tensor(names, files[names])


def _initial(model: Decoder, name: str, seed: int) -> Tensor:
    """The initial value of a router's tensor, which transformers does not have."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    initial: dict[str, Initial] = getattr(module, "initial", {})
    return draw(name, initial[last], getattr(module, last).shape, seed)
