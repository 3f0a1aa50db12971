"""The native engine: the decoder's parts on this rank, gradient accumulation or a pipeline, fused AdamW.

Everything is a sum: each micro-batch's loss is already divided by the counts of the whole step, gradients are summed over ranks, and
the figures reported are sums over ranks too, so that no layout changes them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch
from moe_train.engine import memory
from moe_train.engine.base import Stats, StepResult, Sums
from moe_train.engine.model import Model
from moe_train.model.decoder import Output
from moe_train.model.moe import LayerStats
from moe_train.model.routing import BatchInfo
from moe_train.model.transformer_xl import Memory
from moe_train.optim import clip_gradients, learning_rate, make_optimizer
from moe_train.parallel.fsdp import sync_gradients
from moe_train.parallel.mesh import World

Shapes = dict[str, dict[str, torch.Size]]  # layer -> statistic -> shape

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # logical names that are the same whatever the stages are


class NativeEngine:
    """See `moe_train.engine.base.Engine`."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.model = self._make_model()
        self.optimizers = self._make_optimizers()
        self.steps_done = 0
        self.streams = memory.streams_here(config, world)
        self.memories: list[Memory] = []  # what each micro-batch of the last step left
        self._stats: Stats = {}
        self._shapes: dict[str, Shapes] = {}  # of statistics: this rank's own, and those of all stages
        copies = self.model.shared.copies
        self._copies = {p: copies[name] for name, p in self.model.named_parameters() if name in copies}

    def _make_model(self) -> Model:
        return Model(self.config, self.world).materialise()

    def _make_optimizers(self) -> list[torch.optim.AdamW]:
        return [make_optimizer(part, self.config.optim) for part in self.model.parts]

    def forward_backward(
        self, batch: StepBatch, mark: Callable[[str], None] = lambda part: None, votes: Callable[[], Sequence[float]] = tuple
    ) -> StepResult:
        """Gradients of one step from this rank's micro-batches. `mark` is told after each forward and each backward pass.

        `votes` is asked for numbers when these are done, as many on each rank, which are summed along with the figures.
        """
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        device = self.world.device
        micros, memories = self._go_on(batch)
        feed = [(self.model.batch_info(m, batch, self.steps_done), m.targets.to(device)) for m in micros]
        if self.model.pipeline is None:
            outputs = self._accumulate(feed, memories, mark)
            self.memories = [output.cache for output in outputs if isinstance(output.cache, Memory)]
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
        asked = torch.tensor(votes(), dtype=torch.float64).to(device, non_blocking=True)
        (total, entropy, *others), self._stats = self._sum_over_ranks(
            torch.cat([torch.stack([loss, cross_entropy]), asked]), totals
        )
        return StepResult(total, entropy, self._stats, tuple(others))

    def _go_on(self, batch: StepBatch) -> tuple[list[MicroBatch], list[Memory]]:
        """The step's micro-batches, and what they see of the step before, if they see anything."""
        memories = self.memories if batch.continues and self.memories else memory.start(self.config, self.world)
        if not memories:
            return batch.microbatches, []
        pairs = [memory.go_on(*pair) for pair in zip(batch.microbatches, memories, strict=True)]
        return [micro for micro, _ in pairs], [seen for _, seen in pairs]

    def _accumulate(
        self, feed: list[tuple[BatchInfo, Tensor]], memories: list[Memory], mark: Callable[[str], None]
    ) -> list[Output]:
        """Forward and backward of each micro-batch in turn."""
        part, outputs = self.model.parts[0], []
        for i, (info, targets) in enumerate(feed):
            sync_gradients(part, i == len(feed) - 1, self.config.parallel)
            output = part(info, targets, cache=memories[i] if memories else None)
            mark("forward")
            output.loss.backward()
            mark("backward")
            outputs.append(output._replace(loss=output.loss.detach(), carry=None))
        return outputs

    def step(self, accept: Callable[[float], bool] | None = None) -> float:
        """Clip, update, advance the schedule, run the routers' after_step; returns the gradient norm before clipping.

        `accept` gets that norm: where it returns False, nothing but the schedule moves on. By default a norm that is not finite raises
        FloatingPointError.
        """
        steps = self.config.train.steps
        norm, used = self._update(learning_rate(self.config.optim, self.steps_done + 1, steps), accept or self._check)
        self.steps_done += 1
        if not used:
            self.memories = []  # what the step left may not be finite
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            return norm
        for name, router in self.model.routers().items():
            router.after_step(self._stats[name], self.steps_done / steps)
        return norm

    def _update(self, rate: float, accept: Callable[[float], bool]) -> tuple[float, bool]:
        """The gradient norm before clipping, and whether it was accepted and the parameters were updated."""
        for p in (p for router in self.model.routers().values() for p in router.frozen()):
            p.grad = None  # a zero would still let it decay and move on with Adam's momentum
        parameters = [p for _, p in self.model.named_parameters()]
        norm = float(clip_gradients(parameters, self.config.optim.clip_norm, self._copies, self.config.parallel.pp))
        if not accept(norm):
            return norm, False
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return norm, True

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's gradient of the step, by name: what this rank holds of it. Between `forward_backward` and `step`."""
        for name, p in self.model.named_parameters():
            yield name, torch.zeros_like(p) if p.grad is None else p.grad

    def _check(self, norm: float) -> bool:
        """Raise FloatingPointError unless a gradient norm is finite."""
        if math.isfinite(norm):
            return True
        raise FloatingPointError(
            f"step {self.steps_done + 1}: the gradient norm is {norm}; parameters with such gradients on this rank: "
            f"{', '.join(self._not_finite()[:8]) or 'none'}. Nothing was updated; lower optim.lr or look at the data"
        )

    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor) -> Sums:
        """Cross entropy over micro-batches of all ranks (each rank passes its own, as many each), without gradients.

        With `train.memory` they come in as many streams as training has.
        """
        return self.model.evaluate(microbatches, byte_lengths, memory.start(self.config, self.world))

    def state_dict(self) -> dict[str, Any]:
        """Model (router buffers included) and optimizer moments as sharded tensors under logical names, whatever the layout."""
        moments = {k: v for flat in self._optimizer_states() for k, v in flat.items() if k.startswith("state.")}
        state = {"model": self.model.state_dict(), "optimizer": moments}
        return state | ({"memory": memory.by_stream(self.memories, self.streams)} if self.memories else {})

    def logical_state(self) -> dict[str, Tensor]:
        """What `state_dict` of all ranks together holds, as whole tensors on meta: section and name, shape and dtype."""
        streams = range(self.config.train.global_batch_size)
        kept = memory.row_shapes(self.memories[0]) if self.memories else {}
        memories = {f"memory.{stream}.{name}": row for stream in streams for name, row in kept.items()}
        return self._logical_weights | memories

    @cached_property
    def _logical_weights(self) -> dict[str, Tensor]:
        whole = self.model.whole()
        trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        moments = {f"{name}.{kind}": p for name, p in trained.items() for kind in ("exp_avg", "exp_avg_sq")}
        steps = {f"{name}.step": torch.empty((), dtype=torch.float32, device="meta") for name in trained}
        model = {f"model.{name}": tensor for name, tensor in whole.state_dict().items()}
        return model | {f"optimizer.state.{name}": tensor for name, tensor in (moments | steps).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; hyperparameters stay those of the config. Without memory in it, that starts anew."""
        self.model.load_state_dict(state["model"])
        self.memories = self._restored(state["memory"]) if "memory" in state else []
        for part, optimizer, flat in zip(self.model.parts, self.optimizers, self._optimizer_states(), strict=True):
            moments = {name: state["optimizer"].get(name, value) for name, value in flat.items()}
            set_optimizer_state_dict(part, optimizer, moments, options=FLAT)

    def keeps(self, name: str) -> bool:
        """Whether what a checkpoint's memory has under this name is of a stream of this rank."""
        stream = name.partition(".")[0]
        return self.config.train.memory > 0 and stream.isdecimal() and any(int(stream) in part for part in self.streams)

    def _restored(self, state: dict[str, Tensor]) -> list[Memory]:
        """The memories of this rank's micro-batches. A forward over a token of each row shows what the model keeps."""
        rows = self.config.train.micro_batch_size
        token = torch.zeros(rows, 1, dtype=torch.int64)
        micro = MicroBatch(token, token, token, token, token, token[:, 0])
        start = Memory.start(rows, self.config.train.memory, self.world.device)
        self.model.train(False)
        with torch.no_grad():
            output = self.model.forward(self.model.batch_info(micro), None, start)
        self.model.reshard()
        assert output is not None
        assert isinstance(output.cache, Memory)
        return memory.restore(state, self.streams, output.cache)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        new = [optimizer for optimizer in self.optimizers if not optimizer.state]
        pairs = zip(self.model.parts, self.optimizers, strict=True)
        found = [get_optimizer_state_dict(part, optimizer, options=FLAT) for part, optimizer in pairs]
        for state in (state for optimizer in new for state in optimizer.state.values()):
            state["step"].zero_()  # torch makes what is not there yet by an update without gradients
        return found

    def _not_finite(self) -> list[str]:
        local = ((name, grad.to_local() if isinstance(grad, DTensor) else grad) for name, grad in self.gradients())
        return [name for name, grad in local if not bool(grad.isfinite().all())]

    def _sum_over_ranks(self, numbers: Tensor, stats: dict[str, LayerStats]) -> tuple[list[float], Stats]:
        """Sums of `numbers` [n] and statistics over all ranks, on the CPU, through one all-reduce. float64 holds counts to 2^53."""
        shapes = self._shapes_of_all_stages(stats)
        none = torch.zeros((), device=self.world.device, dtype=torch.float64)
        parts = [
            stats[layer][name].double().flatten() if layer in stats else none.expand(shape.numel())
            for layer, values in shapes.items()
            for name, shape in values.items()
        ]
        flat = torch.cat([numbers, *parts])
        dist.all_reduce(flat)
        sums, rest = flat.cpu().split([len(numbers), len(flat) - len(numbers)])
        summed: Stats = {}
        for layer, values in shapes.items():
            summed[layer] = {}
            for name, shape in values.items():
                summed[layer][name], rest = rest[: shape.numel()].view(shape), rest[shape.numel() :]
        return sums.tolist(), summed

    def _shapes_of_all_stages(self, stats: dict[str, LayerStats]) -> Shapes:
        """Names and shapes of all layers' statistics, which are the same in each step: other stages are asked in the first one."""
        own = {layer: {name: value.shape for name, value in values.items()} for layer, values in stats.items()}
        if self.config.parallel.pp == 1:
            return own
        if not self._shapes:
            everyone: list[Any] = [None] * self.config.parallel.pp
            dist.all_gather_object(everyone, own, group=self.model.layout.group("pp"))
            self._shapes = {"own": own, "all": {layer: values for stage in everyone for layer, values in stage.items()}}
        if own != self._shapes["own"]:
            raise RuntimeError(f"statistics have changed since the first step, from {self._shapes['own']} to {own}")
        return self._shapes["all"]


def _add(totals: dict[str, LayerStats], stats: dict[str, LayerStats]) -> None:
    for layer, values in stats.items():
        kept = totals.setdefault(layer, {})
        for name, value in values.items():
            kept[name] = kept[name] + value if name in kept else value
