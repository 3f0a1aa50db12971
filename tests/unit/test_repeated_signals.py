"""Signals that arrive more than once for one request, as they do under SLURM and torchrun."""

import signal

import pytest
import torch

from moe_train.parallel.mesh import World
from moe_train.stop import Request, StopRequest

ALONE = World(0, 1, torch.device("cpu"), torch.float32, "a test")


def test_sigterm_twice_is_one_request() -> None:
    with StopRequest(ALONE) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() is Request.STOP
        assert stop.name == "SIGTERM"


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_sigint_after_a_request_ends_the_run_at_once(first: int) -> None:
    with StopRequest(ALONE):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
