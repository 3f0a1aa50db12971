"""What all tests share.

Without a GPU Triton's kernels run in its interpreter, which is chosen when triton is first imported: before any test is.
"""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """End the process group that a test has started by training in this process: the next test may want its own."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank: its own, or that of the module."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
