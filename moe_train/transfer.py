"""A new run's weights from a checkpoint: all of them, but for a classifier's head and what the run's router leaves out."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_train.checkpoint import dcp
from moe_train.checkpoint.manifest import read_manifest
from moe_train.config import ModelConfig
from moe_train.engine.model import Model

HEAD = "head."


def take_weights(model: Model, path: Path) -> str:
    """Load the weights of the checkpoint at `path`; what was not taken, for people.

    A classifier's head keeps its initial values. Raises UserError where anything else is missing, left over or of another shape.
    """
    config, state = model.config.model, model.state_dict()
    wanted = {name: value for name, value in state.items() if not (config.num_classes and name.startswith(HEAD))}
    unread = _unread(config, read_manifest(path)["tensors"])
    tensors: dict[str, Any] = {"model": wanted}
    dcp.load(path, tensors, unread)
    model.load_state_dict(state | tensors["model"])
    told = f"; a new head of {config.num_classes} classes" if config.num_classes else ""
    parts = sorted({name.rpartition(".")[2] for name in unread if not name.startswith(f"model.{HEAD}")})
    return told + (f"; not read of its routers: {', '.join(parts)}" if parts else "")


def _unread(config: ModelConfig, names: Collection[str]) -> set[str]:
    """Tensors of a checkpoint that a model of this config has no place for, and should not have."""
    left_out = tuple(f".mlp.router.{name}" for name in config.router.left_out())
    found = {name for name in names if name.startswith("model.") and name.endswith(left_out)} if left_out else set()
    return found | ({name for name in names if name.startswith(f"model.{HEAD}")} if config.num_classes else set())
