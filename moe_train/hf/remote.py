"""Models without an architecture in transformers: which of them can be exported, and the modeling file that they bring."""

import json
import sys
import types
from pathlib import Path
from typing import Any

from moe_train.config import Conflict, ModelConfig
from moe_train.errors import UserError
from moe_train.files import cannot_write, write_atomically
from moe_train.hf.flatten import Flattener
from moe_train.hf.stock import block_conflict, export_conflicts
from moe_train.model.routing import Router, router_class
from moe_train.routers import registry

CLASS, CONFIG_CLASS, PREFIX = "MoETrainForCausalLM", "MoETrainConfig", "decoder"
FILE = "modeling_moe_train.py"
TEMPLATE = "moe_train.hf.modeling"

_MERGES = "it merges its experts' parameters, which transformers' own tools for experts cannot see"
_ESTIMATES = "it is a gradient estimator of the SMEAR paper's comparison, kept for training experiments"
REFUSED = {
    "smear": _MERGES,
    "latent_skills": _MERGES,
    "adamix": f"{_MERGES}, and its training sends each row through twice",
    "st_gumbel": _ESTIMATES,
    "reinforce": _ESTIMATES,
    "dselect_k": _ESTIMATES,
    "ensemble": _ESTIMATES,
    "monolithic": _ESTIMATES,
    "tag": "it needs the label of each document, which no tokenizer gives",
}
EXPORTABLE = (
    "topk",
    "recurrent",
    "acmoe",
    "vqmoe",
    "aux_free",
    "cosine",
    "expert_choice",
    "hash",
    "hypermoe",
    "mlp",
    "random",
    "smoe_dropout",
    "stablemoe",
    "xmoe",
)


def check_exportable(model: ModelConfig) -> None:
    """Raise UserError naming every reason why `model` cannot be exported with a modeling file."""
    name, found = model.router.name, export_conflicts(model)
    if name not in EXPORTABLE:
        reason = REFUSED.get(name, "nobody has tried it; a router is exported once moe_train/hf/remote.py lists it")
        remedy = (
            "use launch/evaluate.py and launch/generate.py, or give the model another router with launch/convert.py swap-router"
        )
        found.append(Conflict("model.router.name", name, f"is not exported: {reason}", remedy))
    if model.block != "llama":
        found.append(block_conflict(model))
    found += [Conflict("model", name, f"is no causal model: {leak}", "train with causal keys") for leak in model.leaks()]
    if found:
        raise UserError("\n".join([f"cannot be exported: {len(found)} problem(s)", *(f"  {conflict}" for conflict in found)]))


def modeling_code(router: str) -> str:
    """The modeling file of a model with that router: self-contained, with torch and transformers as its only imports."""
    flattener = Flattener()
    kind: type[Router] = router_class(registry()[router].model_construct(name=router))
    flattener.add(kind.__module__, kind.__name__)
    for name in (CONFIG_CLASS, CLASS):
        flattener.add(TEMPLATE, name)
    return flattener.write(
        f"A mixture-of-experts language model with router `{router}`.\n\n"
        "Generated from the training code by `launch/convert.py modeling`; do not edit.\n"
    )


def write(model: ModelConfig, seq_len: int, ends: dict[str, Any], folder: Path) -> None:
    """Write config.json and the modeling file."""
    (folder / FILE).write_text(modeling_code(model.router.name), encoding="utf-8")
    module = FILE.removesuffix(".py")
    config = {
        "model_type": "moe_train",
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": f"{module}.{CONFIG_CLASS}", "AutoModelForCausalLM": f"{module}.{CLASS}"},
        "dtype": "float32",
        "max_position_embeddings": seq_len,
        "model": model.model_dump(mode="json"),
        **ends,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_class(router: str) -> Any:
    """The model class of the modeling file for that router. A folder's own file is never run: it could be anybody's."""
    name = f"modeling_moe_train_{router}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        code = compile(modeling_code(router), f"{name}.py", "exec")
        sys.modules[name] = module  # dataclasses look there
        exec(code, vars(module))
    return getattr(sys.modules[name], CLASS)


def write_modeling(router: str, out: Path) -> int:
    """Write the modeling file for that router to `out`; its number of lines."""
    if router not in EXPORTABLE:
        raise UserError(f"{router}: has no modeling file; the routers that have one are {', '.join(EXPORTABLE)}")
    if out.exists():
        raise UserError(f"{out}: is there already; choose another file, or remove it")
    code = modeling_code(router)
    try:
        write_atomically(out, code.encode())
    except OSError as error:
        raise cannot_write(out, error, "OUT") from error
    return len(code.splitlines())
