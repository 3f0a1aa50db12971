"""What an engine does: one optimizer step from micro-batches, evaluation, and its state."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moe_train.data.loader import MicroBatch, StepBatch

Stats = dict[str, dict[str, Tensor]]  # layer -> statistic -> sum over the whole step, on the CPU


@dataclass(frozen=True)
class StepResult:
    """What one forward and backward pass over a step gave, summed over micro-batches and ranks."""

    loss: float  # the training loss: cross entropy per target plus weighted router losses per token
    cross_entropy: float  # nats per target token
    stats: Stats
    votes: tuple[float, ...] = ()  # the ranks' own numbers that came along, summed


@dataclass(frozen=True)
class Sums:
    """Evaluation sums over all ranks."""

    nats: float
    targets: int
    bytes: int


class Scored(NamedTuple):
    """The targets of a micro-batch that one rank has predicted, [n] each, on the CPU."""

    before: Tensor  # int64, the token that each of them follows
    targets: Tensor  # int64
    labels: Tensor  # int64, of their documents
    nats: Tensor  # fp32 (or fp64), what each costs


class Engine(Protocol):
    """The contract between the trainer and whatever runs the model."""

    def forward_backward(
        self, batch: StepBatch, mark: Callable[[str], None] = ..., votes: Callable[[], Sequence[float]] = ...
    ) -> StepResult:
        """Gradients of one step from this rank's micro-batches. `mark` is told after each forward and each backward pass.

        `votes` is asked for numbers when these are done, as many on each rank, which are summed along with the figures.
        """
        ...

    def step(self, accept: Callable[[float], bool] | None = None) -> float:
        """Clip, update, advance the schedule, run the routers' after_step; returns the gradient norm before clipping.

        Where `accept`, which gets that norm, returns False, the step counts and changes nothing.
        """
        ...

    def evaluate(self, microbatches: Iterable[MicroBatch], byte_lengths: Tensor) -> Sums:
        """Cross entropy over micro-batches, without gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Model, router buffers and optimizer, with one logical name per logical tensor."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        ...


__all__ = ["Engine", "MicroBatch", "Scored", "Stats", "StepBatch", "StepResult", "Sums"]
