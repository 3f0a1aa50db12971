"""New models from trained ones: experts from dense MLPs (sparse upcycling, arXiv 2212.05055), and another router in the place of one.

A dense MLP is that of a dense layer, or the one expert of a layer that has one. Each expert of width F is a copy of it; where F is a
G-th of its width, experts are G slices of it in turn, expert c G + g the slice g of copy c (fine-grained upcycling, arXiv 2410.07524).
The function stays what it was where the chosen experts' weights add up to 1 and all slices of a copy are chosen together: their
rows of the gate are equal, top_k is a multiple of G, and `down` is multiplied by G, since each slice gets a G-th of its copy's weight:

    sum_c p_c / G sum_g slice_cg(x) G = sum_c p_c MLP(x) = MLP(x)

Noise, weights that are not renormalised or a capacity change the function, and are said.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_train.checkpoint.logical import LogicalTensor
from moe_train.cli import load_run, merge, read_override
from moe_train.config import Config, Conflict
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE
from moe_train.hf.compare import TOLERANCE, Difference, compare, real_tokens, require_same
from moe_train.hf.native import Native, empty_decoder, logits_of, new_config, open_native, whole_checkpoint
from moe_train.model.decoder import Decoder
from moe_train.model.init import Normal, draw, initialise

SWAPPED = {"router", "frozen_experts"}  # keys of model that may change
UPCYCLED = SWAPPED | {"num_experts", "ffn_hidden_size", "dense_ffn_hidden_size", "num_dense_layers", "moe_layer_freq"}
UPCYCLED |= {"capacity_factor", "drop_policy"}
ROUTER_PARTS = ("mlp.router.", "shared_router.")
GATE_ROWS = (
    "bias",
    "weight",
    "scorer",
    "embedding",
    "scorer_bias",
    "scorer.embeddings",
)  # router parameters with a row for each expert


def upcycle(source: Path, out: Path, overrides: list[str], noise: float = 0.0, tolerance: float = TOLERANCE) -> str:
    """Make the checkpoint `out` of `source` with dense MLPs as experts, as `overrides` say; a line on what that changes.

    Raises UserError, and writes nothing, where a size does not fit, or the function is not what it was and should be.
    """
    native, config = _prepare(source, out, overrides, {"name": "topk"})
    _require_same(native, config, UPCYCLED, "upcycle changes experts and routers alone")
    slices = _slices(native, config)
    changes = _changes(config, slices, noise)
    same = None if changes else str(source)
    difference = _write(native, config, out, lambda: _upcycled(native, config, slices, noise), same, tolerance)
    return f"{difference}" + f"; the function changes: {', '.join(changes)}" * bool(changes)


def swap_router(source: Path, out: Path, overrides: list[str]) -> str:
    """Make the checkpoint `out` of `source` with the router that `overrides` name, newly drawn; a line on what that changes.

    Everything else is copied. Raises UserError, and writes nothing, where something but the router would change.
    """
    native, config = _prepare(source, out, overrides)
    _require_same(native, config, SWAPPED, "swap-router changes the router and model.frozen_experts alone")
    difference = _write(native, config, out, lambda: _swapped(native, config))
    return f"{difference}; a new router changes the function"


def _prepare(source: Path, out: Path, overrides: list[str], router: dict[str, Any] | None = None) -> tuple[Native, Config]:
    """The source, and the config of what is made of it: the source's own with `overrides`, and with `router` in place of its router."""
    native = open_native(source)
    content: dict[str, Any] = load_run(native.path / CONFIG_FILE).model_dump(mode="json")
    if router is not None:  # keys that suited one expert, such as weights that are not renormalised, would change the function
        content["model"]["router"] = router
    for word in overrides:
        content = merge(content, read_override(word))
    return native, new_config(content, native.tokenizer, out)


def _write(
    native: Native,
    config: Config,
    out: Path,
    make: Callable[[], Decoder],
    same: str | None = None,
    tolerance: float = TOLERANCE,
) -> Difference:
    """Write what `make` gives and compare its logits with the source's; `same` names a source that must have the same."""
    tokens = real_tokens(native.tokenizer, config.model.vocab_size or 0, config.train.seq_len)
    before = logits_of(native.build(), tokens)
    with whole_checkpoint(out, config, native.tokenizer, make) as written:
        difference = compare(before, logits_of(open_native(written).build(), tokens))
        if same is not None:
            require_same(difference, f"{same} and what was made of it", tolerance)
    return difference


def _require_same(native: Native, config: Config, changing: set[str], rule: str) -> None:
    """Raise UserError where a key of model differs that is not one of `changing`: a weight could be left out and nobody know."""
    there, here = (c.model.model_dump(exclude=changing) for c in (native.config, config))
    if differ := [f"model.{key}={here[key]}" for key in here if here[key] != there[key]]:
        raise UserError(f"{', '.join(differ)}: {rule}; leave it out")


def _swapped(native: Native, config: Config) -> Decoder:
    """The source's weights with a new router's."""
    tensors = native.tensors
    model = _drawn(config)
    for name, value in model.state_dict().items():
        if not _is_router(name):
            value.copy_(_fitting(tensors, name, value))
    return model


def _upcycled(native: Native, config: Config, slices: int, noise: float) -> Decoder:
    """The source's weights, with experts made from its MLPs."""
    tensors = native.tensors
    model = _drawn(config)
    for name, value in model.state_dict().items():
        if _is_router(name):
            _tie_slices(name, value, slices, config.model.num_experts)
        elif name.endswith(("mlp.experts.gate_up", "mlp.experts.down")):
            value.copy_(_experts(_dense(tensors, name), value.shape, slices, name))
            _shake(name, value, noise, config.run.seed)
        else:
            value.copy_(_fitting(tensors, name, value))
    return model


def _drawn(config: Config) -> Decoder:
    """A decoder with its initial values."""
    model = empty_decoder(config).to_empty(device="cpu")
    initialise(model, config.run.seed)
    return model.eval()


def _is_router(name: str) -> bool:
    return any(part in name for part in ROUTER_PARTS)


def _fitting(tensors: dict[str, LogicalTensor], name: str, value: Tensor) -> Tensor:
    """The source's tensor of that name. Raises UserError where it has none of that shape."""
    found = tensors.get(name)
    if found is None or found.shape != tuple(value.shape):
        has = "is not there" if found is None else f"is {list(found.shape)}"
        raise UserError(f"{name}: must be {list(value.shape)}, and {has} in the source; give the source's own sizes")
    return found.load()


def _dense(tensors: dict[str, LogicalTensor], name: str) -> Tensor:
    """The MLP that the experts `name` are made from: gate_up [2, F, D] or down [D, F]."""
    whole = tensors.get(name)
    if whole is not None:
        return whole.load()[0]
    return tensors[name.replace("experts.down", "down.weight").replace("experts.gate_up", "gate_up")].load()


def _experts(dense: Tensor, shape: torch.Size, slices: int, name: str) -> Tensor:
    """Experts [E, 2, F, D] or [E, D, F] of `shape` from one MLP, in `slices` slices of it."""
    down = name.endswith("down")
    parts = torch.stack(dense.chunk(slices, -1 if down else 1))
    copies = parts.repeat(shape[0] // slices, *[1] * dense.ndim)
    return copies * slices if down else copies


def _shake(name: str, value: Tensor, noise: float, seed: int) -> None:
    """Add noise of so many standard deviations of the matrix to each expert."""
    if noise:
        value += draw(f"{name} noise", Normal(noise * float(value.std())), value.shape, seed)


def _tie_slices(name: str, value: Tensor, slices: int, experts: int) -> None:
    """Give the slices of a copy equal rows of the gate."""
    if slices > 1 and name.partition("router.")[2] in GATE_ROWS and len(value) == experts:
        value.copy_(value[::slices].repeat_interleave(slices, 0))


def _slices(native: Native, config: Config) -> int:
    """Into how many slices an MLP is cut. Raises UserError where the sizes do not allow it."""
    old, new = native.config.model, config.model
    found = []
    for layer in new.moe_layers:
        if layer in old.moe_layers and old.num_experts > 1:
            rule = f"layer {layer} of {native.path} has {old.num_experts} experts already"
            found.append(Conflict("model.num_experts", old.num_experts, rule, "upcycle a model with dense MLPs or one expert"))
            break
    lost = [layer for layer in old.moe_layers if layer not in new.moe_layers]
    if lost:
        found.append(Conflict("model.moe_layer_freq", new.moe_layer_freq, f"layer {lost[0]} would lose its expert", "keep it"))
    widths = {old.ffn_hidden_size if layer in old.moe_layers else old.dense_size for layer in new.moe_layers}
    width = max(widths)
    slices = width // new.ffn_hidden_size
    if widths != {width} or width % new.ffn_hidden_size:
        rule = f"must be a part of the MLPs' width, {' and '.join(map(str, sorted(widths)))}"
        found.append(Conflict("model.ffn_hidden_size", new.ffn_hidden_size, rule, "use it or a divisor of it"))
    elif new.num_experts % slices:
        rule = f"must be a multiple of {slices}, the slices of an MLP of width {width}"
        found.append(Conflict("model.num_experts", new.num_experts, rule, "change it"))
    if new.block != "llama":
        found.append(Conflict("model.block", new.block, "only llama can be upcycled", "upcycle another model"))
    if found:
        raise UserError("\n".join([f"upcycle: {len(found)} problem(s)", *(f"  {conflict}" for conflict in found)]))
    return slices


def _changes(config: Config, slices: int, noise: float) -> list[str]:
    """What keeps the new model from computing what the old one did."""
    model, router = config.model, config.model.router
    found = [f"--noise {noise:g}"] * bool(noise)
    if not getattr(router, "renormalize", False):
        found.append(f"router {router.name} does not divide the chosen weights by their sum")
    if slices > 1 and router.top_k % slices:
        found.append(f"model.router.top_k={router.top_k} is no multiple of {slices}, the slices of an MLP")
    if slices > 1 and not _ties(config):
        found.append(f"router {router.name} chooses the {slices} slices of an MLP apart")
    if model.capacity_factor is not None:
        found.append("model.capacity_factor drops choices")
    return found


def _ties(config: Config) -> bool:
    """Whether the router's scores of the slices of a copy are equal once their rows are."""
    return config.model.router.name in ("topk", "recurrent", "aux_free", "random", "mlp", "cosine", "xmoe")
