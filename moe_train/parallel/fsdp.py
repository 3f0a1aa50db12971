"""Data parallelism: FSDP2 around the decoder, with one fp32 unit for all routers and the experts on their own mesh.

Gradients are summed over ranks and never averaged, because every loss term is already divided by a count of the whole step.
"""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moe_train.config import ParallelSection
from moe_train.model.decoder import Decoder
from moe_train.model.moe import MoE
from moe_train.parallel.mesh import Layout, World


def shard(model: Decoder, layout: Layout, parallel: ParallelSection, world: World) -> None:
    """Wrap `model` in place: routers (with the cell that they share), experts where they have a mesh of their own, blocks, the rest.

    Routers stay in fp32 and are gathered once for all layers: they are small, and their state must not be rounded. Inputs are not
    cast: FSDP would round the fp32 state that is among them.
    """
    # The router state that a block returns is a view; nothing writes into it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    if world.size == 1 and world.dtype in (torch.float32, torch.float64):
        return  # nothing to share and nothing to cast: FSDP would only copy every parameter and gradient
    mesh, expert_mesh = data_mesh(layout.dense), data_mesh(layout.experts)
    reshard = parallel.sharding == "parameters"
    reduced = torch.promote_types(torch.float32, world.dtype)
    wide = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    layers = [block.mlp for block in model.layers.values() if isinstance(block.mlp, MoE)]
    routers: list[nn.Module] = [layer.router for layer in layers]
    if model.shared_router is not None:
        routers.append(model.shared_router)
    if routers:
        fully_shard(routers, mesh=mesh, mp_policy=wide, reshard_after_forward=False)
    if not torch.equal(mesh.mesh, expert_mesh.mesh) or layout.size("ep") > 1:
        place = _placement(layout.experts.size(2))
        for layer in layers:
            fully_shard(
                layer.experts, mesh=expert_mesh, mp_policy=narrow, reshard_after_forward=reshard, shard_placement_fn=place
            )
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=narrow, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which is how FSDP would apply a divide factor.
            module.set_force_sum_reduction_for_comms(world.device.type == "cpu")


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The data-parallel part of a mesh: (replicate, shard), or (shard) alone where nothing is replicated."""
    return mesh["replicate", "shard"] if mesh.size(1) > 1 else mesh["shard"]


def _placement(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    def place(parameter: nn.Parameter) -> Shard | None:
        """Whole experts to each rank where they divide; else a part of each."""
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        return next((Shard(dim) for dim, size in enumerate(local.shape) if size % ranks == 0), None)

    return place


def sync_gradients(model: nn.Module, last: bool, parallel: ParallelSection) -> None:
    """Before a micro-batch: reduce its gradients over ranks at once, or (sharding `optimizer`, `none`) only those of the `last` one."""
    if not isinstance(model, FSDPModule):
        return  # one rank
    at_once = parallel.sharding in ("gradients", "parameters")
    model.set_requires_gradient_sync(last or at_once)
    model.set_reshard_after_backward(last or parallel.sharding == "parameters")  # else gathered parameters serve the whole step
    model.set_is_last_backward(last)
