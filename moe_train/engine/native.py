"""The native engine: FSDP2 around the decoder, gradient accumulation, fused AdamW.

Everything is a sum: each micro-batch's loss is already divided by the counts of the whole step, gradients are summed over ranks, and
the figures reported are sums over ranks too, so that no layout changes them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe_kernels import get_backend
from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch, count_bytes
from moe_train.engine.base import Stats, StepResult, Sums
from moe_train.model.attention import find_segments
from moe_train.model.decoder import Decoder, LayerStats
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo
from moe_train.optim import clip_gradients, learning_rate, make_optimizer
from moe_train.parallel.fsdp import shard, sync_gradients
from moe_train.parallel.mesh import World, make_mesh
from moe_train.parallel.recompute import apply_recompute


def build_model(config: Config, world: World) -> Decoder:
    """The decoder on this rank's device, sharded and with its initial values."""
    kernels = get_backend(config.kernels.backend, world.device)
    with torch.device("meta"):
        model = Decoder(config.model, kernels)
    apply_recompute(model, config.train.recompute)
    shard(model, make_mesh(config.parallel, world), config.parallel, world)
    model.to_empty(device=world.device)
    initialise(model, config.run.seed)
    return model


class NativeEngine:
    """See `moe_train.engine.base.Engine`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.model = build_model(config, world)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.steps_done = 0
        self._stats: Stats = {}

    def forward_backward(self, batch: StepBatch, mark: Callable[[str], None] = lambda part: None) -> StepResult:
        """Gradients of one step from this rank's micro-batches. `mark` is told after each forward and each backward pass."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, LayerStats] = {}
        loss = cross_entropy = torch.zeros((), device=self.world.device, dtype=torch.float64)
        for i, micro in enumerate(batch.microbatches):
            sync_gradients(self.model, i == len(batch.microbatches) - 1, self.config.parallel)
            info = batch_info(micro, self.config, self.world, batch)
            output = self.model(info, micro.targets.to(self.world.device))
            mark("forward")
            output.loss.backward()
            mark("backward")
            loss = loss + output.loss.detach()
            cross_entropy = cross_entropy + output.token_loss.sum(dtype=torch.float64) / batch.target_count
            _add(totals, output.stats)
        figures = _sum_over_ranks({"": {"loss": loss, "cross_entropy": cross_entropy}, **totals})
        step = figures.pop("")
        self._stats = figures
        return StepResult(float(step["loss"]), float(step["cross_entropy"]), figures)

    def step(self) -> float:
        """Clip, update, advance the schedule, run the routers' after_step; returns the gradient norm before clipping."""
        norm = float(clip_gradients(self.model.parameters(), self.config.optim.clip_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.steps_done + 1}: the gradient norm is {norm}; parameters with such gradients on this rank: "
                f"{', '.join(self._not_finite()[:8]) or 'none'}. Nothing was updated; lower optim.lr or look at the data"
            )
        self.steps_done += 1
        rate = learning_rate(self.config.optim, self.steps_done, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        progress = self.steps_done / self.config.train.steps
        for name, block in self.model.layers.items():
            if isinstance(block.mlp, MoE):
                block.mlp.router.after_step(self._stats[name], progress)
        return norm

    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor) -> Sums:
        """Cross entropy over micro-batches of all ranks (each rank passes its own, as many each), without gradients."""
        return evaluate(self.model, self.config, self.world, microbatches, byte_lengths)

    def state_dict(self) -> dict[str, Any]:
        """Model (router buffers included) and optimizer as sharded tensors under logical names."""
        return {"model": get_model_state_dict(self.model), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; hyperparameters stay those of the config."""
        kept = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(values)

    def _not_finite(self) -> list[str]:
        local = [(n, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad) for n, p in self.model.named_parameters()]
        return [name for name, grad in local if grad is not None and not bool(grad.isfinite().all())]


def batch_info(micro: MicroBatch, config: Config, world: World, step: StepBatch | None = None) -> BatchInfo:
    """A micro-batch on the device, with the counts of the whole `step` that it is a part of (1 where losses are not scaled)."""
    segments = find_segments(micro.doc_ids, world.device, world.dtype) if config.data.mask_documents else None
    names = ("tokens", "positions", "doc_ids", "labels", "rows")
    moved = {name: getattr(micro, name).to(world.device, non_blocking=True) for name in names}
    tokens, targets = (step.token_count, step.target_count) if step else (1, 1)
    return BatchInfo(segments=segments, token_count=tokens, target_count=targets, **moved)


@torch.no_grad()
def evaluate(model: Decoder, config: Config, world: World, microbatches: Iterable[MicroBatch], byte_lengths: Tensor) -> Sums:
    """Nats, targets and the targets' bytes (byte_lengths [V]) over micro-batches of all ranks, as many on each."""
    model.eval()
    nats = torch.zeros((), device=world.device, dtype=torch.float64)
    targets = length = 0
    for micro in microbatches:
        output = model(batch_info(micro, config, world), micro.targets.to(world.device))
        nats += output.token_loss.sum(dtype=torch.float64)
        targets += int((micro.targets >= 0).sum())
        length += int(count_bytes(micro.targets, byte_lengths))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves parameters gathered
    sums = torch.tensor([float(nats), targets, length], dtype=torch.float64, device=world.device)
    dist.all_reduce(sums)
    return Sums(float(sums[0]), int(sums[1]), int(sums[2]))


def _add(totals: dict[str, LayerStats], stats: dict[str, LayerStats]) -> None:
    for layer, values in stats.items():
        kept = totals.setdefault(layer, {})
        for name, value in values.items():
            kept[name] = kept[name] + value if name in kept else value


def _sum_over_ranks(figures: Stats) -> Stats:
    """Sums over all ranks, on the CPU, through one all-reduce. float64 holds counts up to 2^53 exactly."""
    flat = torch.cat([value.double().flatten() for values in figures.values() for value in values.values()])
    dist.all_reduce(flat)
    rest = flat.cpu()
    summed: Stats = {}
    for layer, values in figures.items():
        summed[layer] = {}
        for name, value in values.items():
            summed[layer][name], rest = rest[: value.numel()].view(value.shape), rest[value.numel() :]
    return summed
