"""swiglu: every backend against the naive twin, and the twin against torch and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import EVERYWHERE, ON_GPU, ONE_OF_EACH, Where, assert_compiles, compare

from moe_kernels import KernelError
from moe_kernels.swiglu import reference, with_torch


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("shape", [(0, 16), (1, 2), (63, 80), (63, 1200), (257, 16), (2, 5, 896), (10,)])
def test_equals_the_naive_twin(where, shape):
    torch.manual_seed(0)
    got = compare(where, "swiglu", "swiglu", (where.normal(*shape, scale=3.0),), [0])
    assert got.outputs[0].dtype == where.dtype


@given(st.integers(0, 40), st.integers(1, 700))
@settings(max_examples=8, deadline=None)
def test_any_shape_in_the_interpreter(rows, ffn):
    where = Where("triton", "cpu", torch.float32)
    compare(where, "swiglu", "swiglu", (where.normal(rows, 2 * ffn),), [0])


def test_twin_equals_torch():
    x = torch.randn(7, 12, dtype=torch.float64)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(reference.swiglu(x), F.silu(gate) * up, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("op", [reference.swiglu, with_torch.swiglu], ids=["reference", "torch"])
def test_gradient_by_finite_differences(op):
    assert torch.autograd.gradcheck(op, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("where", EVERYWHERE)
def test_extreme_gates_stay_finite(where):
    x = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=where.device, dtype=where.dtype)
    compare(where, "swiglu", "swiglu", (x,), [0])


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_a_slice_is_read_by_its_strides(where):
    x = where.normal(6, 40)[:, 3:13]
    torch.testing.assert_close(where.op("swiglu", "swiglu")(x), reference.swiglu(x))
    x = where.normal(10, 6).t()
    compare(where, "swiglu", "swiglu", (x,), [0])


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("x", [torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.int64), torch.tensor(1.0)])
def test_bad_input(where, x):
    with pytest.raises(KernelError, match=r"swiglu: gate_up must be a floating \[..., 2F\] tensor; got gate_up="):
        where.op("swiglu", "swiglu")(x.to(where.device))


@pytest.mark.parametrize("where", ON_GPU)
def test_flagship_shape(where):
    compare(where, "swiglu", "swiglu", (where.normal(65_536, 896),), [0])


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    assert_compiles(where, "swiglu", "swiglu", lambda tokens: (where.normal(tokens, 24),), [0])
