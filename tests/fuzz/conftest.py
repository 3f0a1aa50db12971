"""Memory for the fuzz tests: a file that makes its reader ask for gigabytes fails the test instead of the machine."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

SPARE = 3 << 30  # address space beyond what the process has, bytes


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
