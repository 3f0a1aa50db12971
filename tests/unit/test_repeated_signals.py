"""Signals that arrive more than once for one request, as they do under SLURM and torchrun."""

import signal
from collections.abc import Iterator

import pytest

from moe_train.stop import Request, StopRequest, agreed


def test_sigterm_twice_is_one_request() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert agreed(stop.votes()) is Request.STOP
        assert stop.name == "SIGTERM"
        assert agreed(stop.votes()) is Request.STOP  # until the run has ended


def test_one_rank_that_was_asked_is_enough_and_stopping_wins() -> None:
    with StopRequest() as quiet, StopRequest() as other:  # signals go to the inner one
        signal.raise_signal(signal.SIGUSR1)
        votes = [sum(pair) for pair in zip(quiet.votes(), other.votes(), strict=True)]
        assert agreed(votes) is Request.SAVE
        assert agreed(other.votes()) is Request.NOTHING  # it was asked once
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert agreed([sum(pair) for pair in zip(quiet.votes(), other.votes(), strict=True)]) is Request.STOP


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own SIGINT, which a process that a shell put into the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigint_after_a_request_ends_the_run_at_once(first: int) -> None:
    with StopRequest():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
