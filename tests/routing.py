"""Single routers for tests: made as a decoder makes them, and asked about rows that a test gives, whole or on several ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from models import config_of
from torch import Tensor, nn

from moe_kernels import get_backend
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Router, Routing, Sharing


def layer_of(router: dict[str, Any], seed: int = 0, spread: float = 0.0, **model: Any) -> MoE:
    """One fp64 layer in training mode; `spread` > 0 draws the router's parameters wide, so that decisions differ."""
    config = config_of(router, num_layers=1, **model).model
    layer = MoE(config, 0, get_backend("torch")).double()
    initialise(layer, seed)
    generator = torch.Generator().manual_seed(seed)
    for p in layer.router.parameters() if spread else ():
        nn.init.normal_(p, 0.0, spread, generator=generator)
    return layer


def rows_of(batch: BatchInfo, size: int = 16, seed: int = 0) -> Tensor:
    """Hidden rows [B, S, D] for a batch."""
    return torch.randn(*batch.tokens.shape, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ask(router: Router, x: Tensor, batch: BatchInfo, memory: Any = None) -> Routing:
    """What the router decides, from a state of zeros."""
    columns = router.state_size_of(router.config, config_of(num_layers=1).model)
    state = torch.zeros(*x.shape[:2], columns, dtype=torch.float64)
    return router(x, state, batch, None, memory)


def run(layer: MoE, x: Tensor, batch: BatchInfo, memory: Any = None) -> Tensor:
    """The layer's output [B, S, D]."""
    routing = ask(layer.router, x, batch, memory)
    return layer.mix(x, routing, layer.plan(routing))


def decode(layer: MoE, x: Tensor, batch: BatchInfo, chunks: list[int]) -> Tensor:
    """The layer's output [B, S, D] for rows that come in chunks of these sizes, with what the router remembers between them."""
    found, memory, start = [], None, 0
    for n in chunks:
        names = ("tokens", "positions", "doc_ids", "labels")
        part = replace(batch, **{name: getattr(batch, name)[:, start : start + n] for name in names})
        new = x[:, start : start + n].contiguous()
        routing = ask(layer.router, new, part, memory)
        found.append(layer.mix(new, routing, layer.plan(routing)))
        memory, start = routing.memory, start + n
    assert start == x.shape[1]
    return torch.cat(found, 1)


def on_ranks(positions: Tensor, batch: BatchInfo, work: Callable[[BatchInfo], Any]) -> list[Any]:
    """`work` with a batch whose rows are shared by ranks that hold these positions [n, S_local]; a thread is a rank."""
    peers = Peers(len(positions))
    shared = [
        Sharing(
            rank, positions, positions[rank], lambda x, r=rank: Add.apply(x, peers, r), lambda x, r=rank: peers.gather(x, r)
        )
        for rank in range(len(positions))
    ]
    with ThreadPoolExecutor(len(positions)) as pool:
        return list(pool.map(lambda sharing: work(replace(batch, sharing=sharing)), shared))


class Peers:
    """Threads that exchange tensors."""

    def __init__(self, n: int) -> None:
        self.barrier, self.slots = threading.Barrier(n, timeout=60), [torch.empty(0)] * n

    def exchange(self, x: Tensor, rank: int) -> list[Tensor]:
        self.slots[rank] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def gather(self, x: Tensor, rank: int) -> Tensor:
        return torch.cat(self.exchange(x.detach(), rank), 1)


class Add(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, rank: int) -> Tensor:
        ctx.peers, ctx.rank = peers, rank
        return torch.stack(peers.exchange(x, rank)).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.stack(ctx.peers.exchange(grad, ctx.rank)).sum(0), None, None
