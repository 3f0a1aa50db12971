"""AdamW over weight-decay groups, the learning-rate schedule, and clipping by the global norm."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_train.config import OptimSection
from moe_train.model.layers import Embedding


def make_optimizer(model: nn.Module, config: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW. Matrices are decayed; norms, biases and embeddings are not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimSection, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `steps`: linear from 0, then a cosine to `min_lr` at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there."""
    return [p.grad for p in parameters if p.grad is not None]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `limit` (None = leave them); return the norm before, []."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm(gradients(parameters))
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
