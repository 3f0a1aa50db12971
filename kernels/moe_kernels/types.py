"""Values that cross the op boundary. Shapes: T tokens, K choices, E experts, M = T * K slots, S = slot number t * K + k."""

from typing import NamedTuple, Protocol

from torch import Tensor


class TileMap(NamedTuple):
    """Which rows each output tile of a grouped GEMM covers; its size is a static bound, so that nothing syncs with the host."""

    expert: Tensor  # [bound] int32, -1 after the last tile
    row: Tensor  # [bound] int32, first row of the tile
    live: Tensor  # [1] int32, number of tiles that are there
    block_rows: int  # rows per tile


class Plan(NamedTuple):
    """Slots sorted by expert (stable). Rows at or after offsets[E] belong to no expert: ops neither write nor read them."""

    offsets: Tensor  # [E + 1] int32, exclusive prefix of the rows per expert; offsets[1:] is the inclusive form of grouped_mm
    row_slot: Tensor  # [M] int32, row -> slot; the token of a row is row_slot // K
    slot_row: Tensor  # [T, K] int32, slot -> row, -1 for an empty slot
    tiles: TileMap | None = None  # only the triton backend fills it

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets.shape[0] - 1

    @property
    def top_k(self) -> int:
        """K."""
        return self.slot_row.shape[1]


class TopK(NamedTuple):
    """What `score_topk` returns."""

    weights: Tensor  # [T, K] fp32 (fp64 for fp64 operands), differentiable
    expert_ids: Tensor  # [T, K] int32, descending score, the lower id first among equals
    scores: Tensor  # [T, E] same dtype as weights: all scores, differentiable (balance losses need them)
    tokens_per_expert: Tensor  # [E] int32
    logits: Tensor  # [T, E] same dtype as weights, differentiable (z-losses need them)


class Reduce(Protocol):
    """How a vocabulary-parallel loss combines its shards; the caller owns the process group."""

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the shards."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the shards."""
        ...
