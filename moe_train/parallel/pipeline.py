"""Pipeline parallelism: consecutive layers on different ranks, on torch.distributed.pipelining.

Between stages travel the hidden rows, the router state (where the router has one) and the running sum of router losses, and back come
the gradients of all three. Everything else about a micro-batch is bound to the stage before the schedule runs. A parameter that several
stages hold (a router's shared cell, a tied embedding) has a part of its gradient on each; `SharedParameters` adds them up.

Shapes: B rows, S_local positions here, D hidden, R router state.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor

from moe_train.config import Config, ParallelSection
from moe_train.flops import layer_costs
from moe_train.model.decoder import Decoder, Output
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Carry, router_class
from moe_train.parallel.fsdp import data_mesh
from moe_train.parallel.mesh import Layout, World

log = logging.getLogger(__name__)

SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
ZERO_BUBBLE = ("zbv", "dualpipev")
Feed = tuple[BatchInfo, Tensor | None]  # a micro-batch and its targets


def stages_of(parallel: ParallelSection, rank: int) -> list[int]:
    """The stages that pipeline rank `rank` holds: its own; or two, laid out in rounds or (zbv, dualpipev) in a V."""
    if parallel.stages == parallel.pp:
        return [rank]
    return [rank, parallel.stages - 1 - rank if parallel.pp_schedule in ZERO_BUBBLE else rank + parallel.pp]


def split_layers(costs: list[float], head: float, stages: int) -> list[int]:
    """How many consecutive layers each stage gets so that the costliest stage, the last one with the head, is as cheap as can be.

    Among equally good splits the later stages get fewer layers. Dynamic programming over (layers left, stages left).
    """
    # first layer of the stages from some one on -> (the costliest of them, layers of each); first for the last stage alone
    best = {i: (sum(costs[i:]) + head, [len(costs) - i]) for i in range(len(costs))}
    for _ in range(stages - 1):
        best = {
            i: min((max(sum(costs[i:j]), best[j][0]), [j - i, *best[j][1]]) for j in best if j > i)
            for i in range(len(costs))
            if any(j > i for j in best)
        }
    return best[0][1]


def make_parts(model: Decoder, config: Config, layout: Layout) -> list[Decoder]:
    """The stages of this rank, cut out of the whole `model` (on meta)."""
    parallel = config.parallel
    costs = layer_costs(config.model, config.train.seq_len)
    counts = parallel.pp_layers or split_layers(*costs, parallel.stages)
    names = iter(model.layers)
    by_stage = [[next(names) for _ in range(count)] for count in counts]
    return [_cut(model, by_stage[i], i == 0, i == parallel.stages - 1) for i in stages_of(parallel, layout.at("pp"))]


def _cut(model: Decoder, layers: list[str], first: bool, last: bool) -> Decoder:
    part = copy.deepcopy(model)
    for name in list(part.layers):
        if name not in layers:
            del part.layers[name]
    if not first and not (last and model.config.tied_head):
        part.embedding = None
    if not last:
        part.norm = part.head = None
    return part


class Stage(nn.Module):
    """A part of the decoder as torch's pipelining calls it: tensors in, tensors out.

    `feed` holds the step's micro-batches and `outputs` what the part returned for each; the pipeline sets and drains them.
    """

    def __init__(self, decoder: Decoder, first: bool, last: bool) -> None:
        super().__init__()
        self.decoder, self.first, self.last = decoder, first, last
        self.feed: Sequence[Feed] = []
        self.outputs: list[Output] = []

    def forward(self, *received: Tensor, micro: Tensor) -> Any:
        """received: nothing that matters on the first stage, else hidden, state (if R > 0) and loss; micro [1]: the micro-batch."""
        batch, targets = self.feed[int(micro)]
        output = self.decoder(batch, targets, None if self.first else self._unpack(received))
        self.outputs.append(output._replace(loss=None if output.loss is None else output.loss.detach(), carry=_NOTHING))
        if self.last:
            return output.logits if output.loss is None else output.loss
        return self._pack(output.carry)

    def _unpack(self, received: tuple[Tensor, ...]) -> Carry:
        hidden, state, loss = received if len(received) == 3 else (received[0], self._no_state(received[0]), received[1])
        # A router may ignore the state; the stage before waits for a gradient all the same, and this one is zero.
        return Carry(hidden, state, loss + state[..., :0].sum())

    def _no_state(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:2], 0, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    def _pack(self, carry: Carry) -> tuple[Tensor, ...]:
        loss = carry.loss + carry.hidden[..., :0].sum()  # a stage without router losses passes a gradient on, too
        state = carry.state.clone()  # zero-bubble schedules detach what a stage returns, which a view does not allow
        if not router_class(self.decoder.config.router).state_grad:
            state = state.detach()
        return (carry.hidden, state, loss) if carry.state.shape[-1] else (carry.hidden, loss)


_NOTHING: Any = None  # outputs must not keep a stage's activations alive


class Pipeline:
    """The stages of this rank and the schedule that runs them with those of the other ranks."""

    def __init__(self, parts: list[Decoder], config: Config, layout: Layout, world: World) -> None:
        self.config, self.layout, self.world = config, layout, world
        self.count, self.group = config.parallel.stages, layout.group("pp")
        self.rank, self.ranks = layout.at("pp"), layout.size("pp")
        self.indices = stages_of(config.parallel, self.rank)
        self.stages = [Stage(part, i == 0, i == self.count - 1) for part, i in zip(parts, self.indices, strict=True)]
        for stage in self.stages:  # torch's pipelining reduces gradients once a step where the stage itself is FSDP's
            fully_shard(stage, mesh=data_mesh(layout.dense), reshard_after_forward=False)
        self._schedule: Any = None

    def train(self, feed: Sequence[Feed]) -> list[Output]:
        """Forward and backward over a step's micro-batches; what the parts here returned."""
        if self._schedule is None:
            self._schedule = self._make_schedule(len(feed))
        for stage in self.stages:
            stage.feed, stage.outputs = feed, []
        numbers = torch.arange(len(feed))
        arguments = (numbers,) if 0 in self.indices else ()
        targets = {"target": numbers, "losses": []} if self.count - 1 in self.indices else {}
        self._schedule.step(*arguments, micro=numbers, return_outputs=False, **targets)
        outputs = [output for stage in self.stages for output in stage.outputs]
        for stage in self.stages:
            stage.feed, stage.outputs = [], []
        return outputs

    def forward(self, batch: BatchInfo, targets: Tensor | None) -> Output | None:
        """One micro-batch without gradients; the last stage's rank gets its output, the others None."""
        received: tuple[Tensor, ...] = ()
        result = None
        for index in range(self.count):
            here, there = self._owner(index), self._owner(index + 1) if index + 1 < self.count else None
            if here == self.rank:
                stage = self.stages[self.indices.index(index)]
                stage.feed = [(batch, targets)]
                sent = stage(*received, micro=torch.zeros(1, dtype=torch.long))
                result = stage.outputs.pop() if stage.last else result
                stage.feed, stage.outputs = [], []
                if there is not None and there != self.rank:
                    for tensor in sent:
                        dist.send(tensor.contiguous(), group=self.group, group_dst=there)
                received = sent
            elif there == self.rank:
                received = tuple(torch.empty_like(t, device=self.world.device) for t in self._metas(*batch.tokens.shape))
                for tensor in received:
                    dist.recv(tensor, group=self.group, group_src=here)
        return result

    @property
    def last(self) -> int:
        """The pipeline rank that holds the last stage."""
        return self._owner(self.count - 1)

    def _owner(self, index: int) -> int:
        return next(rank for rank in range(self.ranks) if index in stages_of(self.config.parallel, rank))

    def _make_schedule(self, count: int) -> Any:
        carry = self._metas(self.config.train.micro_batch_size, self.config.train.seq_len)
        number, loss = torch.empty(1, dtype=torch.long, device="meta"), torch.empty((), device="meta", requires_grad=True)
        schedule = self.config.parallel.pp_schedule
        if schedule in ZERO_BUBBLE and self.world.main and any(reuses_parameters(stage.decoder) for stage in self.stages):
            log.warning(
                "parallel.pp_schedule=%s: router %s uses parameters more than once in a stage, so their gradients are not put off "
                "to fill bubbles; 1f1b and interleaved lose nothing",
                schedule,
                self.config.model.router.name,
            )
        stages = [
            PipelineStage(
                stage,
                index,
                self.count,
                self.world.device,
                input_args=(number,) if stage.first else carry,
                output_args=(loss,) if stage.last else carry,
                group=self.group,
                dw_builder=_no_weight_pass if reuses_parameters(stage.decoder) else None,
            )
            for stage, index in zip(self.stages, self.indices, strict=True)
        ]
        kind = SCHEDULES[schedule]
        # Every loss is a share of the step's, so gradients are summed over micro-batches as they are.
        return kind(stages if self.count > self.ranks else stages[0], count, loss_fn=lambda out, _: out, scale_grads=False)

    def _metas(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """Shapes of what crosses a stage boundary, for whole rows of `length`: hidden, state (if R > 0), loss."""
        model = self.config.model
        shape = (rows, length // (self.layout.size("cp") * self.layout.size("tp")))
        router = router_class(model.router)
        hidden = torch.empty(*shape, model.hidden_size, dtype=self.world.dtype, device="meta", requires_grad=True)
        wide = torch.float64 if self.world.dtype == torch.float64 else torch.float32
        loss = torch.empty(1, dtype=wide, device="meta", requires_grad=True)
        size = router.state_size_of(model.router, model)
        state = torch.empty(*shape, size, dtype=wide, device="meta", requires_grad=router.state_grad)
        return (hidden, state, loss) if size else (hidden, loss)


def reuses_parameters(part: Decoder) -> bool:
    """Whether a stage has a parameter that is used again on the way from one of its uses: a cell shared by its layers, for one.

    Zero-bubble schedules compute the inputs' gradients first and the weights' later. Torch then starts from each use of a weight,
    and on the way to an earlier use frees what the gradients of the weights in between need.
    """
    layers = [block.mlp for block in part.layers.values() if isinstance(block.mlp, MoE)]
    cell = part.shared_router is not None and any(True for _ in part.shared_router.parameters())
    return (cell and len(layers) > 1) or any(layer.router.reuses_parameters for layer in layers)


def _no_weight_pass() -> Callable[[], None]:
    """With this a stage computes its weights' gradients together with its inputs', and has nothing to do later."""
    return lambda: None


class SharedParameters:
    """The parameters that several stages hold. All ranks of the pipeline make it, and call `sum`, together."""

    def __init__(self, parts: Iterable[Decoder], group: dist.ProcessGroup) -> None:
        self.parts, self.group = list(parts), group
        mine = [[(name, _local(p).numel()) for name, p in part.named_parameters()] for part in self.parts]
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        held = [item for rank in everyone for part in rank for item in part]
        self.copies = {name: n for (name, _), n in sorted(Counter(held).items()) if n > 1}  # name -> stages that hold it
        self._dtype = next(self.parts[0].parameters()).dtype
        self._sizes = {name: size for name, size in held if name in self.copies}

    @torch.no_grad()
    def sum(self) -> None:
        """Give every copy the sum of the gradients of all copies."""
        if not self.copies:
            return
        found = [[p for part in self.parts for n, p in part.named_parameters() if n == name] for name in self.copies]
        device = next(self.parts[0].parameters()).device
        sums = [torch.zeros(self._sizes[name], device=device, dtype=self._dtype) for name in self.copies]
        for total, parameters in zip(sums, found, strict=True):
            for gradient in (p.grad for p in parameters if p.grad is not None):
                total += _local(gradient).flatten()
        flat = torch.cat(sums)
        dist.all_reduce(flat, group=self.group)
        for total, parameters in zip(flat.split([self._sizes[name] for name in self.copies]), found, strict=True):
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                target = _local(parameter.grad)
                target.copy_(total.view_as(target))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
