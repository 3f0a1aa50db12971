"""Data parallelism: FSDP2 around the decoder, with one fp32 unit for all routers.

Gradients are summed over ranks and never averaged, because every loss term is already divided by a count of the whole step.
"""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from moe_train.config import ParallelSection
from moe_train.model.decoder import Decoder
from moe_train.model.moe import MoE
from moe_train.parallel.mesh import World


def shard(model: Decoder, mesh: DeviceMesh, parallel: ParallelSection, world: World) -> None:
    """Wrap `model` in place: routers (with the cell that they share), then each block, then the rest.

    Routers stay in fp32 and are gathered once for all layers: they are small, and their state must not be rounded. Inputs are not
    cast: FSDP would round the fp32 state that is among them.
    """
    # The router state that a block returns is a view; nothing writes into it.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    mesh = mesh if parallel.dp_replicate > 1 else mesh["dp_shard"]
    reshard = parallel.sharding == "parameters"
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    routers: list[nn.Module] = [b.mlp.router for b in model.layers.values() if isinstance(b.mlp, MoE)]
    if model.shared_router is not None:
        routers.append(model.shared_router)
    fully_shard(routers, mesh=mesh, mp_policy=wide, reshard_after_forward=False)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=narrow, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=narrow, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which is how FSDP would apply a divide factor.
            module.set_force_sum_reduction_for_comms(world.device.type == "cpu")


def sync_gradients(model: nn.Module, last: bool, parallel: ParallelSection) -> None:
    """Before a micro-batch: reduce its gradients over ranks at once, or (sharding `optimizer`) only those of the `last` one."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last or parallel.sharding != "optimizer")
    model.set_reshard_after_backward(last or parallel.sharding != "optimizer")
    model.set_is_last_backward(last)
