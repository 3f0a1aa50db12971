"""The decoder, laid out over the ranks: what trains, scores and decodes under every layout."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch, count_bytes
from moe_train.engine import memory
from moe_train.engine.base import Scored, Sums
from moe_train.model.attention_kernels import choose_attention
from moe_train.model.cache import Cache
from moe_train.model.decoder import Decoder, Output
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Router
from moe_train.model.transformer_xl import Memory
from moe_train.parallel.apply import parallelize
from moe_train.parallel.collectives import all_gather
from moe_train.parallel.context import deal, share_rows
from moe_train.parallel.mesh import World, make_layout
from moe_train.parallel.pipeline import Pipeline, SharedParameters, make_parts


class Model:
    """The decoder, laid out over the ranks: this rank's part of it (several parts under some pipeline schedules).

    It is made on meta, with shapes and no memory, which needs none of the other ranks; `materialise` makes it a model that runs.
    """

    shared: SharedParameters

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.layout = make_layout(config.parallel, world)
        kernels = get_backend(config.kernels.backend, world.device)
        self.attention = choose_attention(config.kernels.attention, world.device, world.dtype, config.model.head_size)
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

    def forward(self, batch: BatchInfo, targets: Tensor | None, seen: Memory | None = None) -> Output | None:
        """One micro-batch without gradients on all ranks together; None where the last layer is on another rank."""
        if self.pipeline is not None:
            return self.pipeline.forward(batch, targets)
        output: Output = self.parts[0](batch, targets, cache=seen)
        return output

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor | None = None, label: int = 0) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] of documents with a label, the same on all ranks that share rows, which call this together.

        Of each row the first `lengths` [B] tokens are the document (all, without them); what follows is padding.
        """
        self.train(False)
        layout, (count, length) = self.layout, tokens.shape
        ranks = layout.size("cp") * layout.size("tp")
        padded = F.pad(tokens.cpu(), (0, -length % (2 * ranks) if ranks > 1 else 0))  # rows are dealt out evenly
        zeros = torch.zeros_like(padded)
        ends = torch.full((count, 1), length) if lengths is None else lengths.cpu()[:, None]
        columns = torch.arange(padded.shape[1])[None]
        doc_ids = (columns >= ends).long()  # padding is a document of its own
        micro = MicroBatch(padded, zeros, columns - ends * doc_ids, doc_ids, zeros + label, zeros[:, 0])
        output = self.forward(self.batch_info(micro), None)
        self.reshard()
        shape = (count, padded.shape[1] // layout.size("cp"), self.config.model.vocab_size or 0)
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
        parallel, queries = config.parallel, None
        if parallel.cp > 1 and parallel.cp_method == "gather":
            queries = deal(micro.tokens.shape[1], parallel.cp, "gather")[self.layout.at("cp")]
        return BatchInfo(
            segments=self.attention.segments(seen, world.device, queries),
            token_count=step.token_count if step else 1,
            target_count=step.target_count if step else 1,
            step=steps_done,
            seed=config.run.seed,
            sharing=sharing,
            **moved,
        )

    @torch.no_grad()
    def score(self, microbatches: Iterable[MicroBatch], memories: Iterable[Memory] = ()) -> Iterator[Scored]:
        """The targets that this rank predicts, by micro-batch. All ranks call this together, with as many micro-batches each.

        With n `memories`, rows of micro-batch i go on where those of micro-batch i - n have ended, and see what was kept of them.
        """
        self.train(False)
        turns = deque(memories)
        for micro in microbatches:
            seen = turns.popleft() if turns else None
            if seen is not None:
                micro, seen = memory.go_on(micro, seen)
            info, targets = self.batch_info(micro), micro.targets.to(self.world.device)
            output = self.forward(info, targets, seen)
            if output is not None and isinstance(output.cache, Memory):
                turns.append(output.cache)
            if output is not None and output.token_loss is not None:
                found = (info.here(x) for x in (info.tokens, targets, info.labels))
                predicted = info.here(targets) >= 0
                yield Scored(*(x[predicted].cpu() for x in (*found, output.token_loss)))
        self.reshard()

    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor, memories: Iterable[Memory] = ()) -> Sums:
        """Nats, targets and the targets' bytes (byte_lengths [V]) over the micro-batches of all ranks, as many on each.

        `memories`: see `score`.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        for some in self.score(microbatches, memories):
            nats = float(some.nats.sum(dtype=torch.float64))
            bytes_ = int(count_bytes(some.targets, byte_lengths))
            sums += torch.tensor([nats, len(some.targets), bytes_], dtype=torch.float64)
        sums = sums.to(self.world.device)
        dist.all_reduce(sums)
        return Sums(float(sums[0]), int(sums[1]), int(sums[2]))
