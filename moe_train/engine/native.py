"""The native engine: the decoder's parts on this rank, gradient accumulation or a pipeline, fused AdamW.

Everything is a sum: each micro-batch's loss is already divided by the counts of the whole step, gradients are summed over ranks, and
the figures reported are sums over ranks too, so that no layout changes them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch, count_bytes
from moe_train.engine.base import Stats, StepResult, Sums
from moe_train.model.attention import find_segments
from moe_train.model.cache import Cache
from moe_train.model.decoder import Decoder, Output
from moe_train.model.init import initialise
from moe_train.model.moe import LayerStats, MoE
from moe_train.model.routing import BatchInfo, Router, Segments
from moe_train.optim import clip_gradients, learning_rate, make_optimizer
from moe_train.parallel.apply import parallelize
from moe_train.parallel.collectives import all_gather
from moe_train.parallel.context import deal, segments_for_queries, share_rows
from moe_train.parallel.fsdp import sync_gradients
from moe_train.parallel.mesh import World, make_layout
from moe_train.parallel.pipeline import Pipeline, SharedParameters, make_parts

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # logical names that are the same whatever the stages are


class Model:
    """The decoder, laid out over the ranks: this rank's part of it (several parts under some pipeline schedules).

    It is made on meta, with shapes and no memory, which needs none of the other ranks; `materialise` makes it a model that runs.
    """

    shared: SharedParameters

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.layout = make_layout(config.parallel, world)
        kernels = get_backend(config.kernels.backend, world.device)
        self.parts = make_parts(self.whole(), config, self.layout)
        for part in self.parts:
            parallelize(part, self.layout, config, world, kernels)
        self.pipeline = Pipeline(self.parts, config, self.layout, world) if config.parallel.pp > 1 else None

    def whole(self) -> Decoder:
        """The decoder on meta before anything is shared out: logical names, shapes and dtypes."""
        with torch.device("meta"):
            model = Decoder(self.config.model, get_backend(self.config.kernels.backend, self.world.device))
        return model.double() if self.world.dtype == torch.float64 else model

    def materialise(self) -> Self:
        """Allocate every parameter and buffer and give it its initial value, on all ranks together."""
        for part in self.parts:
            part.to_empty(device=self.world.device)
            initialise(part, self.config.run.seed)
        self.shared = SharedParameters(self.parts, self.layout.group("pp"))
        return self

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Of all parts."""
        return (item for part in self.parts for item in part.named_parameters())

    def routers(self) -> dict[str, Router]:
        """The routers of this rank's layers by layer name."""
        blocks = (item for part in self.parts for item in part.layers.items())
        return {name: block.mlp.router for name, block in blocks if isinstance(block.mlp, MoE)}

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        for part in self.parts:
            part.train(mode)

    def forward(self, batch: BatchInfo, targets: Tensor | None, memory: Cache | None = None) -> Output | None:
        """One micro-batch without gradients on all ranks together; None where the last layer is on another rank."""
        if self.pipeline is not None:
            return self.pipeline.forward(batch, targets)
        output: Output = self.parts[0](batch, targets, cache=memory)
        return output

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [1, S, V] of one document's tokens [1, S], the same on all ranks, which call this together."""
        self.train(False)
        layout, length = self.layout, tokens.shape[1]
        ranks = layout.size("cp") * layout.size("tp")
        padded = F.pad(tokens.cpu(), (0, -length % (2 * ranks) if ranks > 1 else 0))  # rows are dealt out evenly
        zeros = torch.zeros_like(padded)
        columns = torch.arange(padded.shape[1])[None]
        doc_ids = (columns >= length).long()  # padding is a document of its own
        micro = MicroBatch(padded, zeros, columns - length * doc_ids, doc_ids, zeros, zeros[:, 0])
        output = self.forward(self.batch_info(micro), None)
        self.reshard()
        shape = (1, padded.shape[1] // layout.size("cp"), self.config.model.vocab_size or 0)
        logits = torch.empty(shape, dtype=self.world.dtype, device=self.world.device)
        if output is not None and output.logits is not None:  # else the last layer is on another rank
            logits = output.logits.contiguous()
        if self.pipeline is not None:
            dist.broadcast(logits, group=layout.group("pp"), group_src=self.pipeline.last)
        if layout.size("cp") > 1:
            order = deal(padded.shape[1], layout.size("cp"), self.config.parallel.cp_method).flatten().argsort()
            logits = all_gather(logits, 1, layout.group("cp"))[:, order.to(logits.device)]
        return logits[:, :length]

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Logits [B, V] of what follows tokens [B, S], which follow those of `cache`; and the cache with them.

        Every rank calls this with the same rows and gets the same. It needs whole rows and all layers here (pp = tp = cp = 1).
        Parameters stay gathered for the next token: `reshard` after the last one.
        """
        self.train(False)
        output = self.parts[0](cache.batch(tokens, self.world.dtype), cache=cache)
        return output.logits[:, 0], output.cache

    def reshard(self) -> None:
        """Free the parameters that a forward without backward leaves gathered."""
        for module in (m for part in self.parts for m in part.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of this rank's parts under logical names."""
        return {name: value for part in self.parts for name, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for part in self.parts:
            set_model_state_dict(part, {name: state[name] for name in get_model_state_dict(part)})

    def batch_info(self, micro: MicroBatch, step: StepBatch | None = None, steps_done: int = 0) -> BatchInfo:
        """A micro-batch on the device, with the counts of the whole `step` that it is a part of (1 where losses are not scaled)."""
        config, world = self.config, self.world
        names = ("tokens", "positions", "doc_ids", "labels", "rows")
        moved = {name: getattr(micro, name).to(world.device, non_blocking=True) for name in names}
        sharing = share_rows(self.layout, micro.tokens.shape[1], config.parallel.cp_method, world.device)
        seen = micro.doc_ids if config.data.mask_documents else torch.zeros_like(micro.doc_ids)
        segments: Segments | None
        if sharing is not None and config.parallel.cp > 1 and config.parallel.cp_method == "gather":
            segments = segments_for_queries(seen.to(world.device), sharing.context)
        else:
            segments = find_segments(seen, world.device, world.dtype)
        return BatchInfo(
            segments=segments,
            token_count=step.token_count if step else 1,
            target_count=step.target_count if step else 1,
            step=steps_done,
            seed=config.run.seed,
            sharing=sharing,
            **moved,
        )

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor, memory: Cache | None = None) -> Sums:
        """Nats, targets and the targets' bytes (byte_lengths [V]) over the micro-batches of all ranks, as many on each.

        With a `memory` the rows of a micro-batch see what it keeps of those before (`moe_train.evaluate.joined`).
        """
        self.train(False)
        sums = torch.zeros(3, dtype=torch.float64)
        for micro in microbatches:
            info = self.batch_info(micro)
            output = self.forward(info, micro.targets.to(self.world.device), memory)
            memory = None if output is None else output.cache
            if output is not None and output.token_loss is not None:
                targets = (
                    info.here(micro.targets) if info.sharing is None else info.here(micro.targets.to(self.world.device)).cpu()
                )
                nats = float(output.token_loss.sum(dtype=torch.float64))
                sums += torch.tensor([nats, int((targets >= 0).sum()), int(count_bytes(targets, byte_lengths))])
        self.reshard()
        sums = sums.to(self.world.device)
        dist.all_reduce(sums)
        return Sums(float(sums[0]), int(sums[1]), int(sums[2]))


class NativeEngine:
    """See `moe_train.engine.base.Engine`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.model = Model(config, world).materialise()
        self.optimizers = [make_optimizer(part, config.optim) for part in self.model.parts]
        self.steps_done = 0
        self._stats: Stats = {}
        copies = self.model.shared.copies
        self._copies = {p: copies[name] for name, p in self.model.named_parameters() if name in copies}

    def forward_backward(self, batch: StepBatch, mark: Callable[[str], None] = lambda part: None) -> StepResult:
        """Gradients of one step from this rank's micro-batches. `mark` is told after each forward and each backward pass."""
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        device = self.world.device
        feed = [(self.model.batch_info(m, batch, self.steps_done), m.targets.to(device)) for m in batch.microbatches]
        if self.model.pipeline is None:
            outputs = self._accumulate(feed, mark)
        else:
            outputs = self.model.pipeline.train(feed)
            self.model.shared.sum()
            mark("pipeline")
        totals: dict[str, LayerStats] = {}
        loss = cross_entropy = torch.zeros((), device=device, dtype=torch.float64)
        for output in outputs:
            _add(totals, output.stats)
            if output.loss is not None and output.token_loss is not None:
                loss = loss + output.loss.detach()
                cross_entropy = cross_entropy + output.token_loss.sum(dtype=torch.float64) / batch.target_count
        figures = self._sum_over_ranks({"": {"loss": loss, "cross_entropy": cross_entropy}, **totals})
        step = figures.pop("")
        self._stats = figures
        return StepResult(float(step["loss"]), float(step["cross_entropy"]), figures)

    def _accumulate(self, feed: list[tuple[BatchInfo, Tensor]], mark: Callable[[str], None]) -> list[Output]:
        """Forward and backward of each micro-batch in turn."""
        part, outputs = self.model.parts[0], []
        for i, (info, targets) in enumerate(feed):
            sync_gradients(part, i == len(feed) - 1, self.config.parallel)
            output = part(info, targets)
            mark("forward")
            output.loss.backward()
            mark("backward")
            outputs.append(output._replace(loss=output.loss.detach(), carry=None))
        return outputs

    def step(self) -> float:
        """Clip, update, advance the schedule, run the routers' after_step; returns the gradient norm before clipping."""
        routers, steps = self.model.routers(), self.config.train.steps
        for p in (p for router in routers.values() for p in router.frozen(self.steps_done / steps)):
            p.grad = None  # a zero would still let it decay and move on with Adam's momentum
        parameters = [p for _, p in self.model.named_parameters()]
        norm = float(clip_gradients(parameters, self.config.optim.clip_norm, self._copies, self.config.parallel.pp))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.steps_done + 1}: the gradient norm is {norm}; parameters with such gradients on this rank: "
                f"{', '.join(self._not_finite()[:8]) or 'none'}. Nothing was updated; lower optim.lr or look at the data"
            )
        self.steps_done += 1
        rate = learning_rate(self.config.optim, self.steps_done, steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        for name, router in routers.items():
            router.after_step(self._stats[name], self.steps_done / steps)
        return norm

    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor) -> Sums:
        """Cross entropy over micro-batches of all ranks (each rank passes its own, as many each), without gradients."""
        return self.model.evaluate(microbatches, byte_lengths)

    def state_dict(self) -> dict[str, Any]:
        """Model (router buffers included) and optimizer moments as sharded tensors under logical names, whatever the layout."""
        moments = {k: v for flat in self._optimizer_states() for k, v in flat.items() if k.startswith("state.")}
        return {"model": self.model.state_dict(), "optimizer": moments}

    def logical_state(self) -> dict[str, Tensor]:
        """What `state_dict` of all ranks together holds, as whole tensors on meta: section and name, shape and dtype."""
        whole = self.model.whole()
        trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        moments = {f"{name}.{kind}": p for name, p in trained.items() for kind in ("exp_avg", "exp_avg_sq")}
        steps = {f"{name}.step": torch.empty((), dtype=torch.float32, device="meta") for name in trained}
        model = {f"model.{name}": tensor for name, tensor in whole.state_dict().items()}
        return model | {f"optimizer.state.{name}": tensor for name, tensor in (moments | steps).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; hyperparameters stay those of the config."""
        self.model.load_state_dict(state["model"])
        for part, optimizer, flat in zip(self.model.parts, self.optimizers, self._optimizer_states(), strict=True):
            moments = {name: state["optimizer"].get(name, value) for name, value in flat.items()}
            set_optimizer_state_dict(part, optimizer, moments, options=FLAT)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        pairs = zip(self.model.parts, self.optimizers, strict=True)
        return [get_optimizer_state_dict(part, optimizer, options=FLAT) for part, optimizer in pairs]

    def _not_finite(self) -> list[str]:
        local = [(n, p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad) for n, p in self.model.named_parameters()]
        return [name for name, grad in local if grad is not None and not bool(grad.isfinite().all())]

    def _sum_over_ranks(self, figures: Stats) -> Stats:
        """Sums over all ranks, on the CPU, through one all-reduce. float64 holds counts up to 2^53 exactly."""
        shapes = {layer: {name: value.shape for name, value in values.items()} for layer, values in figures.items()}
        if self.config.parallel.pp > 1:  # other stages have other layers
            everyone: list[Any] = [None] * self.config.parallel.pp
            dist.all_gather_object(everyone, shapes, group=self.model.layout.group("pp"))
            shapes = {layer: values for stage in everyone for layer, values in stage.items()}
        none = torch.zeros((), device=self.world.device, dtype=torch.float64)
        flat = torch.cat(
            [
                figures[layer][name].double().flatten() if layer in figures else none.expand(shape.numel())
                for layer, values in shapes.items()
                for name, shape in values.items()
            ]
        )
        dist.all_reduce(flat)
        rest = flat.cpu()
        summed: Stats = {}
        for layer, values in shapes.items():
            summed[layer] = {}
            for name, shape in values.items():
                summed[layer][name], rest = rest[: shape.numel()].view(shape), rest[shape.numel() :]
        return summed


def _add(totals: dict[str, LayerStats], stats: dict[str, LayerStats]) -> None:
    for layer, values in stats.items():
        kept = totals.setdefault(layer, {})
        for name, value in values.items():
            kept[name] = kept[name] + value if name in kept else value
