"""Which backend runs where: `auto` by device, one asked for by name or not at all."""

import importlib

import pytest
import torch

from moe_kernels import KernelError, backend, get_backend

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    backend._load.cache_clear()
    yield
    backend._load.cache_clear()


@pytest.fixture
def chip(monkeypatch):
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_auto_is_triton_on_cuda(capability, chip, caplog):
    chip(*capability)
    with caplog.at_level("INFO"):
        chosen = get_backend("auto", CUDA)
        assert get_backend("auto", CUDA) is chosen
    assert chosen.name == "triton"
    assert {op.__module__.rpartition(".")[2] for op in chosen[1:]} == {"with_triton"}
    assert caplog.messages == ["kernels: backend triton on cuda (device is CUDA)"]


def test_auto_is_torch_elsewhere_and_says_why(chip, caplog, monkeypatch):
    chip(7, 5)
    with caplog.at_level("INFO"):
        assert get_backend("auto", "cpu").name == get_backend("auto", CUDA).name == "torch"

        def without_triton(name):
            if name == "triton":
                raise ImportError("No module named 'triton'")
            return load(name)

        load = importlib.import_module
        monkeypatch.setattr(backend.importlib, "import_module", without_triton)
        with pytest.raises(KernelError, match=r"kernels.backend='triton' cannot run on cuda: triton is not installed"):
            get_backend("triton", CUDA)
    assert "device is cpu, and triton kernels need CUDA" in caplog.text
    assert "compute capability 7.5 is below 8.0" in caplog.text


def test_a_backend_asked_for_by_name_runs_or_raises(chip):
    chip(7, 5)
    with pytest.raises(
        KernelError, match=r"kernels.backend='triton' cannot run on cuda: compute capability 7.5 .* Use .*=auto"
    ):
        get_backend("triton", CUDA)
    with pytest.raises(KernelError, match=r"kernels.backend='cuda' is unknown: choose one of auto, reference, torch, triton"):
        get_backend("cuda")
    assert get_backend("reference").moe_mlp.__module__.endswith("reference")
