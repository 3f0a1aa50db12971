"""AdamW over weight-decay groups, the learning-rate schedule, and clipping by the global norm."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_train.config import OptimSection
from moe_train.model.layers import Embedding

NO_COPIES: Mapping[nn.Parameter, float] = MappingProxyType({})


def parameter_groups(model: nn.Module, config: OptimSection) -> list[dict[str, Any]]:
    """The trained parameters by weight decay. Matrices are decayed; norms, biases and embeddings are not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimSection, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `steps`: linear from 0, then a cosine to `last_lr` at the last step."""
    warmup = config.warmup(steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.last_lr + (config.lr - config.last_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float | None, copies: Mapping[nn.Parameter, float] = NO_COPIES, stages: int = 1
) -> Tensor:
    """Scale all gradients so that their joint L2 norm over all ranks is at most `limit` (None = leave them); the norm before, fp64 [].

    Each logical element counts once, whatever mesh its parameter is on: a rank's part counts by the inverse of the number of ranks
    that hold the same part. `stages`: pipeline ranks; `copies`: how many stages hold a parameter, for those that several do.
    """
    by_share = defaultdict[float, list[Tensor]](list)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            parts = 1
            if isinstance(gradient, DTensor):
                mesh = gradient.device_mesh
                parts = math.prod(
                    mesh.size(i) for i, placement in enumerate(gradient.placements) if not placement.is_replicate()
                )
                gradient = gradient.to_local()
            by_share[parts * stages / (ranks * copies.get(parameter, 1))].append(gradient)
    squares = [share * torch.stack(torch._foreach_norm(gs)).double().square().sum() for share, gs in by_share.items()]
    total = torch.stack(squares).sum()
    if ranks > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    if limit is not None:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        scale = torch.where(norm.isfinite(), scale, 1.0)  # else no gradient would tell any more where the fault began
        for gradients in by_share.values():
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    return norm
