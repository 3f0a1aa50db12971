"""Rules of the two kinds of block: which keys each has, and which of its layers have experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_train.config.base import Conflict, Section

if TYPE_CHECKING:
    from moe_train.config.model import ModelConfig

LLAMA_ONLY = ("num_kv_heads", "shared_expert_size", "num_dense_layers", "moe_layer_freq", "qk_norm", "rope_theta")


def block_conflicts(model: ModelConfig) -> list[Conflict]:
    """Keys of the other block, and the rules of the model's own."""
    return [*_block_conflicts(model), *_placement_conflicts(model)]


def _block_conflicts(model: ModelConfig) -> list[Conflict]:
    """Keys of the other block, and rules of transformer_xl."""
    if model.block == "llama":
        return _left_out(
            "model.transformer_xl", model.transformer_xl, type(model.transformer_xl).model_fields, "transformer_xl"
        )
    return _left_out("model", model, LLAMA_ONLY, "llama") + _transformer_xl_conflicts(model)


def _transformer_xl_conflicts(model: ModelConfig) -> list[Conflict]:
    keys, layers, found = model.transformer_xl, model.num_layers, []
    if keys.attn_type != "table" and keys.attn_span != type(keys)().attn_span:
        rule = f"attn_type={keys.attn_type} has no span"
        found.append(Conflict("model.transformer_xl.attn_span", keys.attn_span, rule, "leave it out"))
    if keys.attn_type != "table" and model.hidden_size % 2:
        found.append(Conflict("model.hidden_size", model.hidden_size, "must be even for sinusoids", "use an even width"))
    text, path = keys.layers, "model.transformer_xl.layers"
    if text is None:
        return found
    if len(text) != 2 * layers or set(text[::2]) - set("s.") or set(text[1::2]) - set("gcf.") or ".." in model.sublayers:
        rule = f"must be s or . and then g, c, f or . (not both .) for each of model.num_layers={layers} blocks"
        return [*found, Conflict(path, text, rule, f"write {2 * layers} characters, such as {'sg' * layers}")]
    if not model.moe_layers:
        return [*found, Conflict(path, text, "leaves no block with experts", "put a g where experts are wanted")]
    adaptive = model.router.adaptive_layers(model)
    if [layer for layer, pair in enumerate(model.sublayers) if pair[1] == "c"] != list(adaptive):
        rule = f"router {model.router.name} has an adaptive gate in blocks {list(adaptive)}, and c must be in these"
        remedy = "move the c, or change model.router.name or model.router.plain_layers"
        found.append(Conflict(path, text, rule, remedy))
    return found


def _placement_conflicts(model: ModelConfig) -> list[Conflict]:
    if model.block != "llama":
        return []
    freq, layers = model.moe_layer_freq, model.num_layers
    if isinstance(freq, list) and len(freq) != layers:
        rule = f"must have one entry for each of model.num_layers={layers} blocks"
        return [Conflict("model.moe_layer_freq", freq, rule, "give as many, or a number")]
    if model.num_dense_layers >= layers:
        rule = f"must be below model.num_layers={layers}, so that one block has experts"
        return [Conflict("model.num_dense_layers", model.num_dense_layers, rule, "lower it")]
    if not model.moe_layers:
        rule = f"leaves no block with experts (model.num_layers={layers}, model.num_dense_layers={model.num_dense_layers})"
        return [Conflict("model.moe_layer_freq", freq, rule, "lower it, or put a 1 where experts are wanted")]
    return []


def _left_out(path: str, section: Section, keys: Iterable[str], block: str) -> list[Conflict]:
    """Those of the keys below `path` that are set although another block than the model's has them."""
    changed = [key for key in keys if getattr(section, key) != type(section).model_fields[key].default]
    rule = f"only model.block={block} has it"
    return [Conflict(f"{path}.{key}", getattr(section, key), rule, "leave it out") for key in changed]
