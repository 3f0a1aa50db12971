"""Process group, device and device mesh of a run."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_train.config import Config, ParallelSection
from moe_train.errors import UserError

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # compute dtype
    reason: str  # why this device, dtype and backend, for people

    @property
    def main(self) -> bool:
        """Whether this process speaks to people and writes the shared files."""
        return self.rank == 0


def start_world(config: Config) -> World:
    """Check the layout, then start the process group: NCCL on CUDA, gloo on CPU; one process without torchrun is a world of one."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if problems := config.layout_conflicts(size):
        raise UserError("\n".join([f"layout on {size} ranks: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    device, why = _choose_device(config)
    dtype, numbers = _choose_dtype(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    reason = f"{size} rank(s) on {device.type} ({why}) over {dist.get_backend()}, compute in {str(dtype)[6:]} ({numbers})"
    return World(rank, size, device, dtype, reason)


def _choose_device(config: Config) -> tuple[torch.device, str]:
    wanted, there = config.train.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("train.device=cuda: this machine has no CUDA device that torch can use; use auto or cpu")
    if wanted == "cpu" or not there:
        return torch.device("cpu"), "asked for by name" if wanted == "cpu" else "torch sees no CUDA device"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "torch sees CUDA"


def _choose_dtype(config: Config, device: torch.device) -> tuple[torch.dtype, str]:
    if config.train.dtype != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype], "asked for by name"
    if device.type == "cuda":
        return torch.bfloat16, "half the bytes and many times the matrix rate; masters, router and optimizer stay float32"
    return torch.float32, "few CPUs multiply bfloat16 faster"


def make_mesh(parallel: ParallelSection, world: World) -> DeviceMesh:
    """Mesh with axes (dp_replicate, dp_shard) over all ranks."""
    shard = world.size // parallel.dp_replicate
    return init_device_mesh(world.device.type, (parallel.dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
