"""What a run is trained on and judged by: the trainer does not know whether these are corpora or examples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from moe_train.config import Config
from moe_train.data.loader import MicroBatch, StepBatch
from moe_train.engine.native import NativeEngine
from moe_train.parallel.mesh import World, data_place


class Batches(Protocol):
    """This rank's training batches, and the place in them."""

    def next_step(self) -> StepBatch:
        """The next step's micro-batches."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place as JSON types, the same on every rank."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Go to a place that `state_dict` gave."""
        ...


class Rows(Protocol):
    """This rank's rows of an evaluation, as many micro-batches as on the other ranks."""

    def __iter__(self) -> Iterator[MicroBatch]:
        """All micro-batches, from the first on."""
        ...


@dataclass(frozen=True)
class Followed:
    """Rows that say so to `alive` whenever a micro-batch is taken: an evaluation may take long, and does not stand still."""

    rows: Rows
    alive: Callable[[], None]

    def __iter__(self) -> Iterator[MicroBatch]:
        """Those of `rows`."""
        for micro in self.rows:
            self.alive()
            yield micro


class BatchSizes(TypedDict):
    """Of micro-batches, and the place of a rank among those that share them out."""

    seq_len: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int


def batch_sizes(config: Config, world: World) -> BatchSizes:
    """What all that yields micro-batches of a run is told of them."""
    rank, size = data_place(config.parallel, world)
    train = config.train
    return BatchSizes(seq_len=train.seq_len, micro_batch_size=train.micro_batch_size, dp_rank=rank, dp_size=size)


@dataclass(frozen=True)
class Feed:
    """All data of a run."""

    batches: Batches
    validation: Rows | None  # during training
    splits: Mapping[str, Rows]  # at the end
    judge: Callable[[NativeEngine, Rows], dict[str, Any]]  # figures of an evaluation, the same on all ranks; `loss` among them
