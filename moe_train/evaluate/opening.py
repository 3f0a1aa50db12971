"""Opening a trained model from its checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from moe_train.checkpoint import dcp
from moe_train.checkpoint.manifest import read_manifest
from moe_train.cli import load_run
from moe_train.config import Config
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.engine.model import Model
from moe_train.errors import UserError
from moe_train.parallel.mesh import World, start_world

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
    "engine.name=native",
    "engine.zero_stage=2",
    "engine.offload=none",
    "engine.deepspeed_json=null",
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


def require_language_model(config: Config, path: Path) -> None:
    """Raise UserError where the model of checkpoint `path` predicts classes and no text."""
    if config.model.num_classes is not None:
        rule = f"{path} holds a classifier, which has no next token to predict"
        remedy = "use a language model; launch/sft.py evaluates a classifier"
        raise UserError(f"model.num_classes={config.model.num_classes}: {rule}; {remedy}")


def restore(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Restored:
    """Open the checkpoint at `path`, or the newest of the run there, on this machine's device and ranks."""
    path = dcp.find(path)
    read_manifest(path)  # a damaged checkpoint is named as such before its config is read
    config = load_run(path / CONFIG_FILE, [*PLAIN, *overrides])
    require_language_model(config, path)
    world = start_world(config)
    model = Model(config, world).materialise()
    state = {"model": model.state_dict()}
    step = dcp.load(path, state)["step"]
    model.load_state_dict(state["model"])
    return Restored(config, world, model, load_tokenizer(path / TOKENIZER_FILE), step, path)
