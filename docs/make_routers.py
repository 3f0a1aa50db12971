"""Write docs/routers.md from the docstrings and keys of the routers: python docs/make_routers.py > docs/routers.md (`make docs`)."""

import inspect
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from moe_kernels import get_backend
from moe_train import cli, routers
from moe_train.config import ModelConfig, ParallelSection, RouterConfig
from moe_train.flops import count_flops
from moe_train.model.decoder import Decoder
from moe_train.model.moe import MoE
from moe_train.routers.topk import TokenChoiceConfig

ROOT = Path(__file__).parents[1]
FLAGSHIP = ROOT / "configs" / "rmoe_1b_8xa100.yaml"
AXES = ("tp", "pp", "cp", "ep", "expert_tp")

HEAD = """# Routers

<!-- Written by docs/make_routers.py (`make docs`) from moe_train/routers/: change the docstrings there. -->

`model.router.name` chooses one; each trains with its defaults, which are causal. To add one, see [your_router.md](your_router.md).

## All of them

For each router with its defaults, at the sizes of [configs/rmoe_1b_8xa100.yaml](../configs/rmoe_1b_8xa100.yaml) (hidden size 1280,
24 layers, 16 experts):

- state: floats that a token carries from layer to layer;
- causal: "or not" where a setting gives a published form in which a token sees later ones; the run says so when it starts;
- losses: with their weights; those in brackets are off;
- experts: how many experts' work a token costs; MFLOP: the router's own, training, per token and layer;
- parameters: per layer, in thousands; + those that all layers share; "frozen" those that are never trained;
- refused: axes of `parallel` that it cannot run with.

| name | | state | causal | losses | experts | MFLOP | parameters | refused |
|---|---|--:|---|---|--:|--:|---|---|
"""


def page() -> str:
    """The text of docs/routers.md."""
    kinds = dict(sorted(routers.registry().items()))
    modules = {name: sys.modules[kind.__module__] for name, kind in kinds.items()}
    shared = [m for m in _modules() if m not in modules.values()]
    parts = [HEAD + "".join(_row(name, kind) for name, kind in kinds.items())]
    parts.append("\n## Keys that many share\n\n" + _keys(TokenChoiceConfig))
    parts += [_section(name, modules[name], "\n" + _keys(kind)) for name, kind in kinds.items()]
    parts.append("\n## What several are made of\n")
    parts += [_section(m.__name__.rpartition(".")[2], m, "", "###") for m in shared]
    return "".join(parts)


def _modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(routers.__path__)]
    return [import_module(f"{routers.__name__}.{name}") for name in sorted(names)]


def _row(name: str, kind: type[RouterConfig]) -> str:
    words = [f"model.router.name={name}", f"model.router.top_k={kind.model_fields['top_k'].default}"]
    model = cli.load_run(FLAGSHIP, words).model
    cells = [
        f"[`{name}`](#{name})",
        str(kind.model_fields["name"].description),
        str(_decoder(model).state_size),
        _causality(kind),
        _losses(model.router),
        str(model.router.active_experts(model)),
        _megaflop(model),
        _parameters(model),
        ", ".join(axis for axis in AXES if model.router.layout_conflicts(ParallelSection(**{axis: 2}))),
    ]
    return f"| {' | '.join(cells)} |\n"


def _decoder(model: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(model, get_backend("torch"))


def _causality(kind: type[RouterConfig]) -> str:
    assert not kind().leaks(), f"the defaults of {kind.__name__} are not causal"
    return "yes; or not" if "causal" in kind.model_fields else "yes"


def _losses(config: RouterConfig) -> str:
    weights = config.loss_weights().items()
    return ", ".join([f"{n} {w:g}" for n, w in weights if w] + [f"({n})" for n, w in weights if not w])


def _megaflop(model: ModelConfig) -> str:
    return f"{6e-6 * count_flops(model, 4096).router / len(model.moe_layers):.2f}"


def _parameters(model: ModelConfig) -> str:
    decoder = _decoder(model)
    layer = list(decoder.layers.values())[-1].mlp
    assert isinstance(layer, MoE)
    counts = []
    for module in (layer.router, decoder.shared_router):
        every = [] if module is None else list(module.parameters())
        trained, frozen = (sum(p.numel() for p in every if p.requires_grad == wanted) / 1000 for wanted in (True, False))
        counts.append(f"{trained:.1f}" + (f", {frozen:.1f} frozen" if frozen else ""))
    return counts[0] + (f" + {counts[1]}" if decoder.shared_router is not None else "")


def _section(title: str, module: ModuleType, rest: str, level: str = "##") -> str:
    path = f"moe_train/routers/{Path(str(module.__file__)).name}"
    return f"\n{level} {title}\n\n[{path}](../{path})\n\n{inspect.cleandoc(module.__doc__ or '')}\n{rest}"


def _keys(kind: type[RouterConfig]) -> str:
    """A list of the keys of `kind` that are not those of every token-choice router."""
    common = {} if kind is TokenChoiceConfig else TokenChoiceConfig.model_fields
    lines = []
    for path, form, default, meaning in cli.describe_section("", kind):
        known = common.get(path)
        if path != "name" and (known is None or known.default != kind.model_fields[path].default):
            lines.append(f"- `{path}` ({form}; default {default}): {meaning}\n")
    return "".join(lines)


if __name__ == "__main__":
    print(page(), end="")
