"""A checkpoint as a folder that transformers loads: config.json, safetensors, tokenizer, generation config and model card."""

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.config import ModelConfig
from moe_train.hf import remote
from moe_train.hf.card import model_card
from moe_train.hf.compare import TOLERANCE, Difference, compare, real_text, real_tokens, require_same, their_logits
from moe_train.hf.folders import whole_folder
from moe_train.hf.native import Native, empty_decoder, logits_of, open_native
from moe_train.hf.shards import write_shards
from moe_train.hf.stock import Names, Stock, find_stock, names_of, to_settings
from moe_train.hf.tokenizer_files import write_tokenizer

CARD_FILE = "README.md"


def to_hf(
    source: Path,
    out: Path,
    overrides: list[str] | tuple[str, ...] = (),
    remote_code: bool = False,
    tolerance: float = TOLERANCE,
) -> Difference:
    """Export checkpoint `source` (or the newest of that run) to `out`, and return how far its logits are from ours.

    Top-k models become an architecture of transformers where one computes the same; other routers, and with `remote_code` those
    too, bring a modeling file. Raises UserError, and writes nothing, where neither can be, or the logits differ by
    more than `tolerance` of the largest.
    """
    native = open_native(source, overrides)
    model = native.config.model
    stock = None if remote_code or model.router.name != "topk" else find_stock(model)
    if stock is None:
        remote.check_exportable(model)
    tokens = real_tokens(native.tokenizer, model.vocab_size or 0, native.config.train.seq_len)
    ours = logits_of(native.build(), tokens)
    gc.collect()
    with whole_folder(out) as folder:
        parameters = _write_weights(native, stock, folder)
        _write_settings(native, stock, folder)
        known = None if stock else remote.make_class(model.router.name).config_class.from_pretrained(folder)
        write_tokenizer(native.tokenizer, folder, real_text(), known)
        name = stock.class_name if stock else remote.CLASS
        difference = compare(ours, their_logits(folder, json.loads((folder / "config.json").read_text()), tokens))
        require_same(difference, f"{native.path} and its export", tolerance)
        card = model_card(native, parameters, name, stock is None, out.name, str(difference))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return difference


def _write_weights(native: Native, stock: Stock | None, folder: Path) -> int:
    """Write every tensor under its name in the export, one at a time; the number of parameters, without routers' buffers."""
    tensors = native.tensors
    sizes = {name: math.prod(t.shape) for name, t in tensors.items() if stock is None or _has_place(stock, name)}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if stock is None:
                yield f"{remote.PREFIX}.{name}", tensor.load()
            elif (names := names_of(stock, name, native.config.model.num_experts)) is not None:
                yield from unstack(names, tensor.load())

    write_shards(folder, parts(), 4 * sum(sizes.values()))
    return sum(sizes.get(name, 0) for name, _ in empty_decoder(native.config).named_parameters())


def _has_place(stock: Stock, name: str) -> bool:
    return names_of(stock, name, 1) is not None


def unstack(names: Names, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `tensor` is stacked from, with their names."""
    if isinstance(names, str):
        yield names, tensor
    else:
        for inner, part in zip(names, tensor.unbind(0), strict=True):
            yield from unstack(inner, part)


def _write_settings(native: Native, stock: Stock | None, folder: Path) -> None:
    """config.json, generation_config.json and, without an architecture of transformers, the modeling file."""
    import transformers

    model, seq_len = native.config.model, native.config.train.seq_len
    ends = {"eos_token_id": native.tokenizer.eod, "bos_token_id": None, "pad_token_id": None}
    config: Any
    if stock is not None:
        config = transformers.AutoConfig.for_model(stock.model_type, **to_settings(stock, model, seq_len), **ends)
        config.architectures = [stock.class_name]
        config.dtype = torch.float32
        config.save_pretrained(folder)
    else:
        remote.write(model, seq_len, ends, folder)
    transformers.GenerationConfig(**ends, **_never(native.tokenizer.vocab_size, model)).save_pretrained(folder)


def _never(known: int, model: ModelConfig) -> dict[str, Any]:
    """Ids that round the vocabulary up stand for no text and are never written."""
    rest = list(range(known, model.vocab_size or known))
    return {"suppress_tokens": rest} if rest else {}
