"""A step that went wrong, kept so that one process can compute it again: tensors in safetensors, the rest in JSON, no pickle.

`faults/step-00000013/` of the run folder:

    batch.safetensors   the micro-batches of all data-parallel ranks: `<micro-batch>.tokens`, `.targets` ... int64 [B, S], `.rows` [B]
    rng.safetensors     torch's generators of all ranks at the step
    bundle.json         step, cause, loss, gradient norm, counts, config, which rank had which micro-batch, where the weights are

The weights before the step are a checkpoint without optimizer state in `faults/weights/step-00000012/`, which the bundles of
consecutive skipped steps share, since a skipped step changes none.
"""

import json
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from moe_train.checkpoint import dcp
from moe_train.checkpoint.rng import RNG_FILE, rng_state
from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch
from moe_train.errors import UserError
from moe_train.files import write_atomically
from moe_train.parallel.mesh import World

FOLDER = "faults"
WEIGHTS = "weights"
BATCH_FILE = "batch.safetensors"
BUNDLE_FILE = "bundle.json"
VERSION = 1
NAMES = tuple(field.name for field in fields(MicroBatch))


@dataclass(frozen=True)
class Bundle:
    """A kept step."""

    path: Path
    step: int  # the one that went wrong
    facts: dict[str, Any]  # what bundle.json holds
    batch: StepBatch  # of all ranks
    ranks: list[int]  # of each micro-batch: the first rank that had it

    @property
    def weights(self) -> Path:
        """The checkpoint of the weights before the step."""
        return self.path.parent / WEIGHTS / self.facts["weights"]


def count(folder: Path) -> int:
    """Bundles in the run folder."""
    return len(list((folder / FOLDER).glob(f"step-*/{BUNDLE_FILE}")))


def save(
    folder: Path,
    step: int,
    batch: StepBatch,
    weights: dict[str, Any],
    weights_step: int,
    fresh: bool,
    facts: dict[str, Any],
    config: Config,
    world: World,
    files: dict[str, bytes],
) -> Path:
    """Write the bundle of `step` into the run folder, from all ranks together. Raises OSError, or NotSaved, on all of them.

    `weights`: the model's sharded tensors, which have been the same since `weights_step`; `fresh`: they are written even where a
    checkpoint of that step is there, from before a restart. `files`: what a checkpoint has beside tensors.
    """
    path = folder / FOLDER / f"step-{step:08d}"
    everyone: list[list[dict[str, Tensor]]] | None = [[]] * world.size if world.main else None
    mine = [{name: getattr(micro, name).cpu() for name in NAMES} for micro in batch.microbatches]
    dist.gather_object(mine, everyone)
    rng = rng_state(world.device)
    there = path.parent / WEIGHTS
    name = f"step-{weights_step:08d}"
    known: list[bool] = [not fresh and (there / name).is_dir()]
    dist.broadcast_object_list(known)
    if not known[0]:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.parallel.timeout_seconds))
        try:
            dcp.save(there, weights_step, {"model": weights}, {"config": config.model_dump(mode="json")}, files, group=group)
        finally:
            dist.destroy_process_group(group)

    def write() -> None:
        assert everyone is not None
        tensors, ranks = _distinct(everyone)
        write_atomically(path / BATCH_FILE, safetensors.torch.save(tensors))
        write_atomically(path / RNG_FILE, rng)
        content = {
            "version": VERSION,
            "step": step,
            **facts,
            "token_count": batch.token_count,
            "target_count": batch.target_count,
            "ranks": ranks,
            "world_size": world.size,
            "dtype": {torch.bfloat16: "bf16", torch.float64: "fp64"}.get(world.dtype, "fp32"),
            "device": world.device.type,
            "torch": torch.__version__,
            "weights": name,
            "config": config.model_dump(mode="json"),
        }
        write_atomically(path / BUNDLE_FILE, json.dumps(content, indent=1).encode())

    dcp.on_main(write)
    return path


def _distinct(everyone: list[list[dict[str, Tensor]]]) -> tuple[dict[str, Tensor], list[int]]:
    """Each micro-batch once, though pipeline, tensor and context parallel ranks have the same ones, and the first rank that has it."""
    tensors: dict[str, Tensor] = {}
    ranks: list[int] = []
    seen = set()
    for rank, micros in enumerate(everyone):
        for micro in micros:
            key = tuple(micro["rows"].tolist())
            if key not in seen:
                seen.add(key)
                tensors |= {f"{len(ranks)}.{name}": value.contiguous() for name, value in micro.items()}
                ranks.append(rank)
    return tensors, ranks


def load(path: Path) -> Bundle:
    """Read the bundle at `path`. Raises UserError where it is none, or damaged."""
    try:
        facts = json.loads((path / BUNDLE_FILE).read_bytes())
        if facts.get("version") != VERSION:
            raise ValueError(f"version {facts.get('version')}, and this code reads {VERSION}")
        tensors = safetensors.torch.load_file(path / BATCH_FILE)
        micros = [MicroBatch(**{name: tensors[f"{i}.{name}"].clone() for name in NAMES}) for i in range(len(facts["ranks"]))]
        batch = StepBatch(micros, int(facts["token_count"]), int(facts["target_count"]))
        if not isinstance(facts["weights"], str) or "/" in facts["weights"] or not isinstance(facts["config"], dict):
            raise ValueError("it names no weights, or holds no config")
        return Bundle(path, int(facts["step"]), facts, batch, [int(rank) for rank in facts["ranks"]])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        remedy = "give a folder runs/<name>/faults/step-<number>"
        raise UserError(f"{path}: no bundle that can be replayed: {type(error).__name__}: {error}; {remedy}") from None
