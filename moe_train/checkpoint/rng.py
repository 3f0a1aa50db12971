"""The random generators of all ranks, as tensors in a checkpoint.

Training itself draws from none of them: noise comes from `BatchInfo.random`, the order of the data and the initial weights from seeds.
They are kept so that code which does draw from torch's generators goes on exactly, too. Python's and numpy's are used nowhere.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from moe_train.errors import UserError

RNG_FILE = "rng.safetensors"


def rng_state(device: torch.device) -> bytes:
    """What the generators of all ranks hold: `cpu` and, on CUDA, `cuda`, each uint8 [ranks, bytes]. Every rank calls this."""
    here = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        here["cuda"] = torch.cuda.get_rng_state(device)
    ranks: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, here)
    return safetensors.torch.save({name: torch.stack([rank[name] for rank in ranks]) for name in here})


def restore_rng(path: Path, device: torch.device) -> bool:
    """Set this rank's generators from checkpoint `path`. False, and nothing set, where other ranks or devices wrote it.

    Raises UserError where the file holds no such state.
    """
    try:
        saved = safetensors.torch.load_file(path / RNG_FILE)
        if len(saved["cpu"]) != dist.get_world_size() or ("cuda" in saved) != (device.type == "cuda"):
            return False
        # Copies, since torch reads a view at the wrong address.
        mine = {name: states[dist.get_rank()].clone() for name, states in saved.items()}
        torch.set_rng_state(mine["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], device)
    except (OSError, SafetensorError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path / RNG_FILE}: no state of torch's generators: {error}; use another checkpoint") from None
    return True
