"""What turns one decoder into this rank's share of it, in the one order that works.

Experts before tensor parallelism, which leaves them alone; both before recomputation and compilation, which wrap what is then
there; FSDP last, around parameters that are already DTensors. The model files know nothing of it.
"""

import torch

from moe_kernels import Backend
from moe_train.config import Config
from moe_train.model.attention import Attention
from moe_train.model.attention_kernels import AttentionKernel, choose_attention
from moe_train.model.decoder import Decoder
from moe_train.parallel.context import apply_context
from moe_train.parallel.expert import apply_expert
from moe_train.parallel.fsdp import shard
from moe_train.parallel.mesh import Layout, World
from moe_train.parallel.recompute import apply_recompute
from moe_train.parallel.tensor import apply_tensor


def parallelize(model: Decoder, layout: Layout, config: Config, world: World, kernels: Backend) -> None:
    """Make `model` (on meta, whole or the layers of a pipeline stage) this rank's part of `layout`, in place."""
    parallel = config.parallel
    if world.dtype == torch.float64:
        model.double()
    if parallel.ep > 1 or parallel.expert_tp > 1:
        apply_expert(model, layout.experts["ep", "expert_tp"], kernels)
    if parallel.tp > 1:
        apply_tensor(model, layout.dense["tp"])
    apply_attention(model, choose_attention(config.kernels.attention, world.device, world.dtype, config.model.head_size))
    if parallel.cp > 1:
        apply_context(model, layout.group("cp"), parallel.cp_method)
    apply_recompute(model, config.train.recompute)
    if config.train.compile:
        for block in model.layers.values():
            block.compile()
    if config.engine.name == "native":
        shard(model, layout, parallel, world)


def apply_attention(model: Decoder, kernel: AttentionKernel) -> None:
    """Let the attention of `model` be computed by `kernel`, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = kernel.attend
