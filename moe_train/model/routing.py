"""The router contract: what a router is given, what it decides, and what crosses layers.

Shapes: B rows, S positions, S_local positions held by this rank, T = B * S_local tokens, D hidden, E experts, K choices,
R floats of router state per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig, RouterConfig
from moe_train.model.experts import Merge


class Carry(NamedTuple):
    """What goes from block to block and from pipeline stage to pipeline stage."""

    hidden: Tensor  # [B, S_local, D] residual stream, compute dtype
    state: Tensor  # [B, S_local, R] router state, fp32 (fp64 in an fp64 model); R = 0 when stateless
    loss: Tensor  # [1] fp32 (or fp64), running sum of weighted router losses


class Segments(NamedTuple):
    """Which keys a query sees, in the form that the attention takes: a mask, or bounds of runs, or blocks.

    A run is some consecutive queries of one document, its last one at its last key. Without `keys` they are the documents.
    """

    mask: Tensor | None = None  # [B, 1, queries, keys] bool, True where a query sees a key
    bounds: Tensor | None = None  # [n + 1] int32, first query of each run in the flattened rows of queries, then their number
    keys: Tensor | None = (
        None  # [m] int64, in the flattened rows of keys: those that each run sees, one run's behind the other's
    )
    key_bounds: Tensor | None = None  # [n + 1] int32, the runs in `keys`
    blocks: Any = None  # torch.nn.attention.flex_attention.BlockMask

    def twice(self, key_count: int) -> Segments:
        """Those of the rows, with `key_count` keys in all, and of a copy of each."""
        return Segments(
            mask=None if self.mask is None else torch.cat([self.mask, self.mask]),
            bounds=None if self.bounds is None else _after(self.bounds, self.bounds),
            keys=None if self.keys is None else torch.cat([self.keys, self.keys + key_count]),
            key_bounds=None if self.key_bounds is None else _after(self.key_bounds, self.key_bounds),
            blocks=None if self.blocks is None else _double_blocks(self.blocks),
        )


def _after(bounds: Tensor, others: Tensor) -> Tensor:
    """The bounds of some runs and of others behind them."""
    return torch.cat([bounds[:-1], bounds[-1] + others])


def _double_blocks(blocks: Any) -> Any:
    """A block mask whose function takes its row modulo the rows that there are."""
    parts = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    doubled = (None if x is None else torch.cat([x, x]) for x in parts)
    return type(blocks).from_kv_blocks(*doubled, blocks.BLOCK_SIZE, blocks.mask_mod, blocks.seq_lengths)


@dataclass(frozen=True)
class Sharing:
    """How some ranks share the positions of the same rows (sequence and context parallelism)."""

    rank: int  # this rank among them
    positions: Tensor  # [n, S_local] int64, the positions that each rank's hidden rows hold
    context: (
        Tensor  # [S_context] int64, the positions that this rank's attention works on: its own and its tensor-parallel peers'
    )
    add: Callable[[Tensor], Tensor]  # differentiable sum over the ranks
    gather: Callable[[Tensor], Tensor]  # [B, S_local, ...] -> [B, n * S_local, ...] in the order of `positions`, differentiable


@dataclass(frozen=True)
class BatchInfo:
    """Facts about a micro-batch: whole rows, the same on every pipeline stage and on all ranks that share these rows."""

    tokens: Tensor  # [B, S] int64
    positions: Tensor  # [B, S] int64, from 0 in each document
    doc_ids: Tensor  # [B, S] int64, number of the document inside its row, from 0
    labels: Tensor  # [B, S] int64, the document's source, 0 if unknown
    rows: Tensor  # [B] int64, global row numbers
    segments: Segments | None  # which keys a query sees when rows pack several documents; None = causal over the whole row
    token_count: int = 1  # real tokens of the whole optimizer step, over all ranks
    target_count: int = 1  # target tokens of the whole optimizer step, over all ranks
    step: int = 0  # optimizer steps done before this one
    seed: int = 0  # of the run
    sharing: Sharing | None = None  # None = this rank holds whole rows

    def here(self, x: Tensor) -> Tensor:
        """The part of x [B, S, ...] at the positions of this rank's hidden rows: [B, S_local, ...]."""
        return x if self.sharing is None else x[:, self.sharing.positions[self.sharing.rank]]

    def context(self, x: Tensor) -> Tensor:
        """The part of x [B, S, ...] at the positions of this rank's attention: [B, S_context, ...]."""
        return x if self.sharing is None else x[:, self.sharing.context]

    def sum(self, x: Tensor) -> Tensor:
        """Differentiable sum over the ranks that share these rows."""
        return x if self.sharing is None else self.sharing.add(x)

    def whole(self, x: Tensor) -> Tensor:
        """Whole rows [B, S, ...] from each rank's x [B, S_local, ...], differentiable."""
        if self.sharing is None:
            return x
        return self.sharing.gather(x)[:, self.sharing.positions.flatten().argsort()]

    def random(self, name: str, layer: int, n: int) -> Tensor:
        """Uniforms in [0, 1), [B, S_local, n] fp32, from (seed, step, row, position in the row, layer, name) alone.

        So every layout, schedule, recomputation and resume draws the same numbers. Never draw from a generator in a router.
        """
        index = self.here(torch.arange(self.tokens.shape[1], device=self.tokens.device)[None])
        columns = torch.arange(n, device=index.device)
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{self.step}/{layer}/{name}".encode()).digest()[:7], "little")
        x = scramble(scramble(self.rows[:, None, None] + key) + index[..., None])
        return (scramble(scramble(x) + columns) & 0xFFFFFF).float() / 0x1000000

    def twice(self) -> BatchInfo:
        """The rows and a copy of each, which draws other random numbers. The counts double, so that losses keep their scale."""
        tokens, positions, doc_ids, labels = (x.repeat(2, 1) for x in (self.tokens, self.positions, self.doc_ids, self.labels))
        return replace(
            self,
            token_count=2 * self.token_count,
            target_count=2 * self.target_count,
            tokens=tokens,
            positions=positions,
            doc_ids=doc_ids,
            labels=labels,
            rows=torch.cat([self.rows, -1 - self.rows]),
            segments=None if self.segments is None else self.segments.twice(self.tokens.numel()),
        )


def scramble(x: Tensor) -> Tensor:
    """A hash of each int64 in x: SplitMix64's finaliser, in wrapping arithmetic with logical shifts."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class ExpertCall(Protocol):
    """The experts of a layer as a router's `mix` sees them, with whatever parallelism there is behind."""

    def __call__(self, rows: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """rows [n, D] with the ids and weights [n, K] of the routing -> [n, D], the weighted sum of each row's experts."""
        ...

    def merged(self, rows: Tensor, merged_ids: Tensor, merge: Merge) -> Tensor:
        """rows [T, D], each through the merged expert that merged_ids [T, 1] int32 names -> [T, D]. Every expert must be here."""
        ...


class Routing(NamedTuple):
    """What a router decides for T tokens."""

    weights: Tensor  # [T, K]; a router whose `mix` sends n rows per token returns [n * T, K]
    expert_ids: Tensor  # [T, K] int32; -1 is an empty slot, which every kernel skips
    state: Tensor  # [B, S_local, R] for the next layer's router
    losses: dict[str, Tensor]  # unweighted [], summed over local tokens; weights are RouterConfig.loss_weights
    stats: dict[
        str, Tensor
    ]  # detached local sums, of the same shapes in each step; the engine sums them over ranks for after_step
    memory: Any = None  # decoding only: what later tokens of a sequence need; its tensors are [B, ...]
    extra: tuple[Tensor, ...] = ()  # what this router's own `mix` needs besides ids and weights


class Router(nn.Module):
    """Base of every router. A forward pass changes nothing; `after_step` is the only place where buffers change."""

    registry: ClassVar[dict[type[RouterConfig], type[Router]]] = {}
    state_grad: ClassVar[bool] = True  # False where the state is assignments and not a function with a gradient
    reuses_parameters: ClassVar[bool] = False  # True where a layer uses a parameter both before and after its experts
    two_passes: ClassVar[bool] = False  # True where training sends each row through twice and asks the two to agree

    def __init__(self, config: RouterConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.config, self.layer, self.kernels = config, layer, kernels

    @staticmethod
    def state_size_of(config: Any, model: ModelConfig) -> int:
        """R: floats of state per token; static, so that a pipeline can size its buffers."""
        return 0

    @staticmethod
    def make_shared(config: Any, model: ModelConfig, kernels: Backend) -> nn.Module | None:
        """A module that all layers share, or None."""
        return None

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Any = None) -> Routing:
        """x [B, S_local, D] normed hidden rows, state [B, S_local, R] -> Routing. With `memory`, x and batch are the tokens that follow
        those of the call which returned it."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def mix(self, x: Tensor, routing: Routing, experts: ExpertCall) -> Tensor:
        """x [B, S_local, D] and what this router decided -> [B, S_local, D]. Methods that change the mixing override it.

        Recomputation may run it twice; it decides nothing.
        """
        return experts(x.flatten(0, 1), routing.expert_ids, routing.weights).view_as(x)

    @staticmethod
    def readout(config: Any, state: Tensor, token_loss: Tensor) -> dict[str, Tensor]:
        """Losses that need the tokens' own loss (REINFORCE): state [B, S_local, R] after the last layer, token_loss [B, S_local]
        detached -> unweighted [] sums over local tokens, as Routing.losses. It owns no parameters."""
        return {}

    def active_params(self) -> int:
        """Matrix entries that one token's routing multiplies by. Override where a matrix is looked up, or used once for all tokens."""
        return sum(p.numel() for p in self.parameters() if p.ndim >= 2)

    def frozen(self) -> list[nn.Parameter]:
        """Parameters that the next step neither updates nor decays, which buffers that `after_step` changes decide.

        For those that are frozen in mid-run; one that is never trained has requires_grad False.
        """
        return []

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor], progress: float) -> None:
        """Update buffers from the whole step's `stats` of this layer; `progress` is the share of training done."""


SomeRouter = TypeVar("SomeRouter", bound=type[Router])


def register(config: type[RouterConfig]) -> Callable[[SomeRouter], SomeRouter]:
    """Class decorator: this router is what `config` describes."""

    def add(router: SomeRouter) -> SomeRouter:
        Router.registry[config] = router
        return router

    return add


def router_class(config: RouterConfig) -> type[Router]:
    """The router that a configuration describes. Raises TypeError where none says so."""
    kind = type(config)
    if kind not in Router.registry:
        raise TypeError(f"no router is registered for {kind.__name__}: decorate its class with @register({kind.__name__})")
    return Router.registry[kind]
