"""Fixtures of the kernel tests. Without a GPU the Triton kernels run in Triton's interpreter, on poisoned memory."""

import pytest
import torch

from moe_kernels import launch


def pytest_configure(config):
    # A GPU machine may lack pytest-timeout, and markers are strict.
    config.addinivalue_line("markers", "timeout(seconds): fail after so long, with pytest-timeout")


GUARD = 64  # elements before and after each allocation


def poisoned(shape, dtype, device):
    """Memory of which every element, and every element around it, is one that must not be used; and the buffer around it."""
    shape = tuple(shape)
    count = 1
    for size in shape:
        count *= size
    poison = float("nan") if dtype.is_floating_point else -777_777
    buffer = torch.full((count + 2 * GUARD,), poison, dtype=dtype, device=device)
    return buffer[GUARD : GUARD + count].view(shape), buffer


def is_poison(tensor):
    return torch.isnan(tensor) if tensor.dtype.is_floating_point else tensor == -777_777


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what kernels allocate with NaN, or with an index that no tensor has, and check that nothing is written around it."""
    buffers = []

    def allocate(shape, dtype, device):
        tensor, buffer = poisoned(shape, dtype, device)
        buffers.append(buffer)
        return tensor

    monkeypatch.setattr(launch, "_allocate", allocate)
    yield
    for buffer in buffers:
        assert is_poison(buffer[:GUARD]).all(), "a kernel wrote before its output"
        assert is_poison(buffer[-GUARD:]).all(), "a kernel wrote past its output"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    return torch.device(request.param)
