"""Tensor and sequence parallelism: matrices are split over `tp`, and between them each rank holds a part of every row.

Attention and dense MLPs gather the rows' positions, work on their heads or columns, and scatter the sum (Megatron-LM, arXiv
2205.05198); norms and routers see their own positions only; embedding and head hold a part of the vocabulary. Parameters are
DTensors, so that initialisation, FSDP and checkpoints know the whole; inside a forward they read as this rank's part.

Shapes: B rows, S_context positions of this context-parallel rank, S_local = S_context / tp of them here, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from moe_train.model.attention import Attention
from moe_train.model.decoder import Decoder
from moe_train.model.layers import Embedding, Head, SwiGLU
from moe_train.parallel.collectives import all_gather, reduce_scatter

# parameter (the end of its name) -> the dim that is split; all others are whole on every rank
SPLIT = {
    "attention.q.weight": 0,
    "attention.k.weight": 0,
    "attention.v.weight": 0,
    "attention.out.weight": 1,
    "mlp.gate_up": 1,
    "mlp.down.weight": 1,
    "shared_expert.gate_up": 1,
    "shared_expert.down.weight": 1,
    "embedding.weight": 0,
    "head.weight": 0,
}


def apply_tensor(model: Decoder, mesh: DeviceMesh) -> None:
    """Split `model` over the 1-D `mesh`, in place; experts are left alone."""
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            dim = next((dim for end, dim in SPLIT.items() if full.endswith(end)), None)
            # A whole parameter gets a part of its gradient on each rank, from the rank's own positions or heads.
            placement, grad = (Replicate(), Partial()) if dim is None else (Shard(dim), Shard(dim))
            split_parameter(module, name, parameter, mesh, (placement,), (grad,))
    group = mesh.get_group()
    for module in model.modules():
        if isinstance(module, Attention | SwiGLU):
            module.register_forward_pre_hook(lambda _, args: (all_gather(args[0], 1, group), *args[1:]))
            module.register_forward_hook(lambda _, args, out: reduce_scatter(out, 1, group))
        elif isinstance(module, Embedding):
            module.lookup = VocabularyLookup(group)
        elif isinstance(module, Head):
            module.shards = VocabularyShards(group)


def split_parameter(
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    grads: tuple[Placement, ...],
) -> None:
    """Make a parameter a DTensor that reads as its local part inside of `module`, with gradients of placements `grads`."""
    whole = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

    def read(self: nn.Module) -> Tensor | None:
        value = self._parameters[name]
        if isinstance(value, DTensor) and value.device_mesh.ndim == mesh.ndim:
            return value.to_local(grad_placements=grads)
        return value  # between uses FSDP puts its own shard, a DTensor on one more axis, in this place

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(read)})


class VocabularyLookup:
    """Embedding rows from a vocabulary of which each rank holds a part."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens [B, S_context], weight [V / tp, D] -> [B, S_local, D]."""
        index = tokens - self.group.rank() * weight.shape[0]
        here = (index >= 0) & (index < weight.shape[0])
        found = F.embedding(torch.where(here, index, 0), weight)
        return reduce_scatter(torch.where(here[..., None], found, 0), 1, self.group)


class VocabularyShards:
    """A head of which each rank holds a part of the vocabulary; `moe_kernels.types.Reduce` over the ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather(self, hidden: Tensor) -> Tensor:
        """[B, S_local, D] -> [B, S_context, D]."""
        return all_gather(hidden, 1, self.group)

    def start(self, weight: Tensor) -> int:
        """The first vocabulary row of this rank."""
        return self.group.rank() * weight.shape[0]

    def mine(self, x: Tensor) -> Tensor:
        """This rank's positions [B, S_local] of x [B, S_context]."""
        return x.chunk(self.group.size(), 1)[self.group.rank()]

    def whole(self, logits: Tensor) -> Tensor:
        """Logits [B, S_context, V / tp] -> [B, S_context, V]."""
        return all_gather(logits, logits.ndim - 1, self.group)

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, op, group=self.group)
        return x
