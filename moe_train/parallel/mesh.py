"""Process group, device and device mesh of a run."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_train.agent import part_of
from moe_train.config import Config, ParallelSection
from moe_train.config.layout import check_layout
from moe_train.errors import UserError
from moe_train.parallel.listening import open_store
from moe_train.parallel.rendezvous import fresh_store


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
    check_layout(config, size)
    device, why = _choose_device(config)
    dtype, numbers = _choose_dtype(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        alone = _on_one_machine(size)
        if alone:  # else others must be able to connect
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            shared, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = fresh_store(part_of(shared, os.environ["TORCHELASTIC_RUN_ID"]), rank, size, timeout)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        else:
            host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
            if not port.isdecimal():
                raise UserError(f"MASTER_PORT={port}: ranks at MASTER_ADDR={host} need its port, too; set it, or use torchrun")
            store = open_store(host, int(port), timeout, "MASTER_ADDR", alone, holder=rank == 0)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    reason = f"{size} rank(s) on {device.type} ({why}) over {dist.get_backend()}, compute in {str(dtype)[6:]} ({numbers})"
    return World(rank, size, device, dtype, reason)


def _on_one_machine(size: int) -> bool:
    """Whether all ranks are here: launchers other than torchrun may not say how many are, but then they name an address."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]) == size
    return os.environ.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1", "::1")


def _choose_device(config: Config) -> tuple[torch.device, str]:
    wanted, there = config.train.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UserError("train.device=cuda: this machine has no CUDA device that torch can use; use auto or cpu")
    if wanted == "cpu" or not there:
        return torch.device("cpu"), "asked for by name" if wanted == "cpu" else "torch sees no CUDA device"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "torch sees CUDA"


def _choose_dtype(config: Config, device: torch.device) -> tuple[torch.dtype, str]:
    if config.train.dtype != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[config.train.dtype], "asked for by name"
    if device.type == "cuda":
        return torch.bfloat16, "half the bytes and many times the matrix rate; masters, router and optimizer stay float32"
    return torch.float32, "few CPUs multiply bfloat16 faster"


@dataclass(frozen=True)
class Layout:
    """Where this rank stands on every axis, and the meshes over which things are shared out.

    Ranks are numbered with tp fastest, then cp, dp_shard, dp_replicate and pp. The experts see the ranks of dp_shard, cp and tp as
    (efsdp, ep, expert_tp) instead, with efsdp * ep * expert_tp = dp_shard * cp * tp.
    """

    dense: DeviceMesh  # (pp, replicate, shard, tp): `shard` holds dp_shard * cp ranks
    experts: DeviceMesh  # (pp, replicate, shard, ep, expert_tp)
    rows: DeviceMesh  # (pipeline and data, cp, tp): the last two share rows
    sharers: dist.ProcessGroup  # the cp * tp ranks that share this rank's rows, tp fastest

    def size(self, axis: str) -> int:
        """Ranks along an axis of the dense mesh, `cp`, `ep` or `expert_tp`."""
        return self._mesh_of(axis).size(self._dim(axis))

    def at(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self._mesh_of(axis).get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank's peers along an axis."""
        return self._mesh_of(axis).get_group(axis)

    def _mesh_of(self, axis: str) -> DeviceMesh:
        return next(m for m in (self.dense, self.experts, self.rows) if axis in (m.mesh_dim_names or ()))

    def _dim(self, axis: str) -> int:
        return (self._mesh_of(axis).mesh_dim_names or ()).index(axis)


def data_place(parallel: ParallelSection, world: World) -> tuple[int, int]:
    """(this rank's place, how many) among data-parallel ranks: those that work on different rows."""
    shared = parallel.cp * parallel.tp
    count = world.size // (parallel.pp * shared)
    return world.rank // shared % count, count


def make_layout(parallel: ParallelSection, world: World) -> Layout:
    """The meshes of a layout. `sharding: none` is a shard axis of one rank with everything else in `replicate`."""
    pp, tp, cp, ep, expert_tp = parallel.pp, parallel.tp, parallel.cp, parallel.ep, parallel.expert_tp
    copies = parallel.dp_replicate
    inner = world.size // (pp * copies)  # dp_shard * cp * tp
    ranks = torch.arange(world.size)
    outer = inner // (ep * tp)
    by_expert = ranks.view(pp, copies, outer, ep, tp)
    if expert_tp == 1:  # tensor-parallel peers hold the same experts: they are data-parallel ranks to them
        by_expert = by_expert.movedim(4, 3).reshape(pp, copies, outer * tp, ep, 1)
    dense = ranks.view(pp, copies, inner // tp, tp)
    if parallel.sharding == "none":
        dense, by_expert = dense.flatten(1, 2)[:, :, None], by_expert.flatten(1, 2)[:, :, None]
    rows = ranks.view(-1, cp, tp)
    kind = world.device.type
    names = ("pp", "replicate", "shard")
    return Layout(
        DeviceMesh(kind, dense, mesh_dim_names=(*names, "tp")),
        DeviceMesh(kind, by_expert, mesh_dim_names=(*names, "ep", "expert_tp")),
        DeviceMesh(kind, rows, mesh_dim_names=("data", "cp", "tp")),
        DeviceMesh(kind, rows.flatten(1), mesh_dim_names=("data", "sharers")).get_group("sharers"),
    )
