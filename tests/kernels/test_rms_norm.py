"""rms_norm and add_rms_norm: every backend against the naive twin, and the twin against torch and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    EVERYWHERE,
    ON_GPU,
    ONE_OF_EACH,
    TRITON,
    Where,
    assert_bitwise_equal,
    assert_compiles,
    compare,
)

from moe_kernels import KernelError
from moe_kernels.rms_norm import reference, with_torch

SHAPES = [(0, 8), (1, 8), (63, 72), (257, 40), (2, 5, 1280), (20,)]


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wide_weight", [True, False])
def test_rms_norm_equals_the_naive_twin(where, shape, wide_weight):
    torch.manual_seed(0)
    args = (where.normal(*shape), where.normal(shape[-1], wide=wide_weight), 1e-5)
    got = compare(where, "rms_norm", "rms_norm", args, [0, 1])
    assert got.outputs[0].dtype == where.dtype


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 8192)])
def test_add_rms_norm_equals_the_naive_twin(where, shape):
    torch.manual_seed(0)
    # steps of 1/8: the sum is exact in every dtype, so that the twin norms the same numbers
    x, branch = ((torch.randint(-32, 32, shape) / 8).to(where.device, where.dtype) for _ in range(2))
    got = compare(where, "rms_norm", "add_rms_norm", (x, branch, where.normal(shape[-1], wide=True), 1e-5), [0, 1, 2])
    assert got.outputs[0].dtype == got.outputs[1].dtype == where.dtype
    assert torch.equal(got.outputs[0], x + branch)


@given(st.integers(0, 50), st.integers(1, 300))
@settings(max_examples=8, deadline=None)
def test_any_shape_in_the_interpreter(tokens, hidden):
    where = Where("triton", "cpu", torch.float32)
    args = (where.normal(tokens, hidden), where.normal(tokens, hidden), where.normal(hidden), 1e-6)
    compare(where, "rms_norm", "add_rms_norm", args, [0, 1, 2])


@pytest.mark.parametrize("where", TRITON)
def test_ranges_of_several_tiles_of_rows(where, monkeypatch):
    where.op("rms_norm", "rms_norm")
    monkeypatch.setattr("moe_kernels.rms_norm.with_triton._RANGES", 2)
    compare(where, "rms_norm", "rms_norm", (where.normal(500, 64), where.normal(64, wide=True), 1e-5), [0, 1])


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_the_norm_is_taken_of_the_rounded_sum(where):
    dtype = torch.bfloat16 if where.backend != "triton" else torch.float16
    x, branch = (torch.randn(9, 24, device=where.device).to(dtype) for _ in range(2))
    weight = torch.rand(24, device=where.device)
    total, y = where.op("rms_norm", "add_rms_norm")(x, branch, weight, 1e-6)
    assert torch.equal(total, x + branch)
    assert torch.equal(y, where.op("rms_norm", "rms_norm")(total, weight, 1e-6))


def test_twin_equals_torch():
    x, weight = torch.randn(7, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    expected = F.rms_norm(x, (12,), weight, 1e-3)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("module", [reference, with_torch], ids=["reference", "torch"])
def test_gradient_by_finite_differences(module):
    args = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,))]
    assert torch.autograd.gradcheck(lambda x, w: module.rms_norm(x, w, 1e-3), args[1:])
    assert torch.autograd.gradcheck(lambda x, b, w: module.add_rms_norm(x, b, w, 1e-3), args)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_one_output_alone_has_the_right_gradient(where):
    """The gradient of an output that nobody used must count as zero."""
    args = [where.normal(5, 8).requires_grad_(), where.normal(5, 8), where.normal(8), 1e-6]
    for i in (0, 1):
        (grad,) = torch.autograd.grad(where.op("rms_norm", "add_rms_norm")(*args)[i].square().sum(), args[0])
        (truth,) = torch.autograd.grad(reference.add_rms_norm(*args)[i].square().sum(), args[0])
        torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_bad_input(where):
    x, weight = torch.zeros(4, 6, device=where.device), torch.zeros(6, device=where.device)
    norm, add_norm = where.op("rms_norm", "rms_norm"), where.op("rms_norm", "add_rms_norm")
    with pytest.raises(KernelError, match=r"rms_norm: weight must be floating \[D\] .* got weight=\[5\]"):
        norm(x, weight[:5], 1e-6)
    with pytest.raises(KernelError, match="eps must not be negative; got eps=-1"):
        norm(x, weight, -1.0)
    with pytest.raises(KernelError, match="x must be a floating"):
        norm(x.int(), weight, 1e-6)
    with pytest.raises(KernelError, match="add_rms_norm: branch must have x's shape, dtype and device"):
        add_norm(x, x.half(), weight, 1e-6)


@pytest.mark.parametrize("where", TRITON)
def test_more_columns_than_a_program_holds(where):
    with pytest.raises(KernelError, match="D up to 8192"):
        where.op("rms_norm", "rms_norm")(where.normal(1, 8193), where.normal(8193), 1e-6)


@pytest.mark.parametrize("where", TRITON)
def test_two_runs_are_bitwise_equal(where):
    args = (where.normal(600, 64), where.normal(64), 1e-6)
    assert_bitwise_equal(where, "rms_norm", "rms_norm", args, [0, 1])


@pytest.mark.parametrize("where", ON_GPU)
def test_flagship_shape(where):
    args = (where.normal(16_384, 1280), where.normal(1280, wide=True), 1e-6)
    compare(where, "rms_norm", "rms_norm", args, [0, 1])
    assert_bitwise_equal(where, "rms_norm", "rms_norm", args, [0, 1])


@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    def make(tokens):
        return where.normal(tokens, 16), where.normal(tokens, 16), where.normal(16, wide=True), 1e-6

    assert_compiles(where, "rms_norm", "add_rms_norm", make, [0, 1, 2])
