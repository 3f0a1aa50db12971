"""Runs that a test starts do not outlive it."""

from collections.abc import Iterator

import pytest
from torchruns import Torchrun


@pytest.fixture
def started() -> Iterator[list[Torchrun]]:
    """Those that a test has started; what still runs is killed."""
    started: list[Torchrun] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.kill()
