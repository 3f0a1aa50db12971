"""The megablocks backend against the naive twin, with a grouped GEMM that has the real one's signature, checks and order of sizes."""

import itertools
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType, SimpleNamespace

import pytest
import torch
from moe_cases import assert_close, gradients, in_double, moe_inputs, run_moe

from moe_kernels import KernelError, backend, get_backend, megablocks
from moe_kernels.grouped_mm import reference as naive_mm
from moe_kernels.grouped_mm import with_megablocks as mm
from moe_kernels.moe_mlp import reference, with_megablocks
from moe_kernels.permutation import with_torch

CUDA = torch.device("cuda")
SHAPES = [  # T, E, K, D, F, routing
    (0, 4, 2, 16, 8, "uniform"),
    (1, 8, 2, 64, 32, "uniform"),
    (63, 5, 3, 40, 16, "holes"),
    (63, 5, 2, 72, 40, "zipf"),
    (70, 4, 2, 72, 40, "duplicates"),
    (130, 4, 1, 64, 40, "one"),
    (20, 6, 2, 40, 8, "none"),
]
NAMES = ("out", "grad x", "grad w_gate_up", "grad w_down", "grad weights")


def grouped_gemm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """grouped_gemm 0.3's `backend.gmm` as its cuBLAS build checks and computes it: groups behind each other, the rest untouched."""
    assert not (trans_a and trans_b)
    assert (batch_sizes.device.type, batch_sizes.dtype, batch_sizes.ndim) == ("cpu", torch.int64, 1)
    assert a.ndim == 2
    assert b.ndim == (2 if trans_a else 3)
    assert a.is_contiguous()
    assert b.is_contiguous()
    experts = len(batch_sizes)
    assert trans_a or len(b) == experts
    shape = (experts, a.shape[1], b.shape[1]) if trans_a else (a.shape[0], b.shape[1] if trans_b else b.shape[2])
    c = torch.full(shape, float("nan"), dtype=a.dtype)
    bounds = [0, *itertools.accumulate(batch_sizes.tolist())]
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if trans_a:
            c[expert] = a[start:end].T @ b[start:end]
        else:
            c[start:end] = a[start:end] @ (b[expert].T if trans_b else b[expert])
    return c


@pytest.fixture
def stand_in(monkeypatch, device):
    """On a CPU: another grouped GEMM, and the dtypes that Triton's interpreter is right in."""
    if device.type == "cuda":
        if why := megablocks.why_unavailable(device):
            pytest.skip(why)
        return (torch.bfloat16,)
    monkeypatch.setattr(megablocks, "_load_gmm", lambda: grouped_gemm)
    monkeypatch.setattr(megablocks, "DTYPES", (torch.float32, torch.float16))
    return megablocks.DTYPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, device, stand_in):
    *sizes, mode = shape
    for dtype in stand_in:
        inputs = moe_inputs(*sizes, dtype, device, mode)
        expected = run_moe(reference.moe_mlp, *in_double(*inputs))
        actual = run_moe(with_megablocks.moe_mlp, *inputs)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            assert_close(a, b, dtype, name)
        assert not actual[4][inputs[3] < 0].any(), "an empty slot has a routing gradient"


def test_grouped_products(device, stand_in):
    for dtype in stand_in:
        x, w, _, ids, _, _ = moe_inputs(40, 5, 2, 24, 16, dtype, device, "holes")
        plan = with_torch.sort_by_expert(ids, 5)
        live = int(plan.offsets[-1])
        rows, grad = with_torch.permute(x, plan), torch.randn(80, 32, device=device).to(dtype)
        actual = gradients(lambda rows, w: mm.grouped_mm(rows, w, plan)[:live], (rows, w), grad[:live])  # noqa: B023
        wide = in_double(rows, w, grad)
        expected = gradients(lambda rows, w: naive_mm.grouped_mm(rows, w, plan)[:live], wide[:2], wide[2][:live])  # noqa: B023
        for name, a, b in zip(("out", "grad rows", "grad w"), actual, expected, strict=True):
            part = slice(0, live) if name == "grad rows" else slice(None)
            assert_close(a[part], b[part], dtype, name)


def test_sizes_come_to_the_host_once_in_each_pass(device, stand_in):
    calls = []
    sizes = megablocks.group_sizes
    parts = with_megablocks.PARTS._replace(groups=lambda offsets: calls.append(0) or sizes(offsets))
    op = with_megablocks.compose("megablocks_counted", parts)
    inputs = moe_inputs(20, 4, 2, 16, 8, stand_in[0], device)
    run_moe(lambda *args: op(*args)[0], *inputs)
    assert len(calls) == 2


def test_what_it_cannot_take_is_named(device, stand_in):
    x, gate_up, down, ids, weights, _ = moe_inputs(6, 3, 2, 16, 12, stand_in[0], device)
    with pytest.raises(KernelError, match=r"multiples of 8, got \[12\]; use kernels.backend=triton"):
        with_megablocks.moe_mlp(x, gate_up, down, ids, weights)
    x, gate_up, down, ids, weights, _ = moe_inputs(6, 3, 2, 16, 8, torch.bfloat16, "cpu")
    if device.type == "cpu":
        with pytest.raises(KernelError, match="megablocks computes in bfloat16, got bfloat16"):
            with_megablocks.moe_mlp(x, gate_up, down, ids, weights)


def test_asked_for_on_a_cpu():
    with pytest.raises(
        KernelError, match=r"kernels.backend='megablocks' cannot run on cpu: .*CUDA device.* Use kernels.backend=auto"
    ):
        get_backend("megablocks", "cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A device with these versions of the two packages, and this for megablocks.grouped_gemm_util."""

    def make(versions, backend=None, capability=(8, 0)):
        def version(package):
            if package not in versions:
                raise PackageNotFoundError(package)
            return versions[package]

        module = ModuleType("megablocks.grouped_gemm_util")
        module.backend = backend
        monkeypatch.setattr(megablocks, "version", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "megablocks", ModuleType("megablocks"))
        monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", module)
        megablocks._load_gmm.cache_clear()

    yield make
    megablocks._load_gmm.cache_clear()


BOTH = {"megablocks": "0.10.0", "grouped_gemm": "0.3.0"}


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, "megablocks is not installed; docs/install.md"),
        ({"megablocks": "0.10.0"}, "grouped_gemm is not installed; docs/install.md"),
        (BOTH | {"megablocks": "0.7.0"}, "megablocks is 0.7.0, and 0.10 is needed"),
        (BOTH | {"grouped_gemm": "0.1.6"}, "grouped_gemm is 0.1.6, and 0.3 is needed"),
        (BOTH, "cannot be imported .*found no grouped_gemm.* build it for this torch"),
    ],
)
def test_why_it_is_unavailable(versions, message, gpu):
    gpu(versions)
    with pytest.raises(KernelError, match=message):
        get_backend("megablocks", CUDA)


def test_an_old_gpu_is_refused(gpu):
    gpu(BOTH, SimpleNamespace(gmm=grouped_gemm), capability=(7, 5))
    assert "8.0" in megablocks.why_unavailable(CUDA)


def test_where_it_runs_the_rest_is_triton(gpu, caplog):
    gpu(BOTH | {"triton": "3.7.1"}, SimpleNamespace(gmm=grouped_gemm))
    backend._load.cache_clear()
    with caplog.at_level("INFO"):
        chosen = get_backend("megablocks", CUDA)
    assert "block-sparse kernels with triton 3.2 and newer, and triton is 3.7.1" in caplog.text
    assert chosen.moe_mlp is with_megablocks.moe_mlp
    assert chosen.grouped_mm is mm.grouped_mm
    assert chosen.rms_norm.__module__ == "moe_kernels.rms_norm.with_triton"
    assert megablocks._load_gmm() is grouped_gemm
    backend._load.cache_clear()


def test_a_build_for_cublas_gets_its_sizes_on_the_host(device, stand_in):
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)
    sizes = megablocks.group_sizes(offsets)
    assert (sizes.tolist(), sizes.dtype) == ([3, 0, 5], torch.int64)
