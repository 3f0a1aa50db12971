"""rope: every backend against the naive twin, and the twin against complex rotation and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import EVERYWHERE, ON_GPU, ONE_OF_EACH, Where, assert_compiles, compare

from moe_kernels import KernelError
from moe_kernels.rope import reference, with_torch


def tables(where, rows, length, half):
    angles = torch.rand(rows, length, half, dtype=torch.float64) * 6.3
    return angles.cos().to(where.device, where.wide), angles.sin().to(where.device, where.wide)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (1, 1, 1, 2), (2, 63, 3, 40), (1, 257, 5, 64), (3, 7, 2, 256)])
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_the_naive_twin(where, shape, per_row):
    torch.manual_seed(0)
    rows, length, _, dim = shape
    got = compare(where, "rope", "rope", (where.normal(*shape), *tables(where, rows if per_row else 1, length, dim // 2)), [0])
    assert got.outputs[0].dtype == where.dtype
    assert got.outputs[0].is_contiguous()


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_any_shape_in_the_interpreter(rows, length, heads, half):
    where = Where("triton", "cpu", torch.float32)
    compare(where, "rope", "rope", (where.normal(rows, length, heads, 2 * half), *tables(where, rows, length, half)), [0])


def test_twin_rotates_half_split_pairs():
    x, angles = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.rand(2, 5, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    got = reference.rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("op", [reference.rope, with_torch.rope], ids=["reference", "torch"])
def test_gradient_by_finite_differences(op):
    cos, sin = tables(Where("torch", "cpu", torch.float64), 1, 3, 2)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x, cos, sin), x)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_heads_of_a_fused_projection_need_no_copy(where):
    fused = where.normal(2, 9, 7, 16)
    cos, sin = tables(where, 1, 9, 8)
    for x in (fused[:, :, 2:5], fused.transpose(1, 2).contiguous().transpose(1, 2), fused[..., ::2].repeat(1, 1, 1, 2)):
        compare(where, "rope", "rope", (x, cos, sin), [0])
        torch.testing.assert_close(where.op("rope", "rope")(x, cos, sin), reference.rope(x, cos, sin))


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_bad_input(where):
    rope, device = where.op("rope", "rope"), where.device
    x, table = torch.zeros(2, 5, 3, 8, device=device), torch.zeros(1, 5, 4, device=device)
    with pytest.raises(KernelError, match=r"x must be a floating \[B, S, H, d\] tensor with even d; got x=\[2, 5, 3, 7\]"):
        rope(x[..., :7], table, table)
    with pytest.raises(KernelError, match=r"sin must be floating \[B or 1, S, d/2\]"):
        rope(x, table, table[:, :3])
    with pytest.raises(KernelError, match="cos must be constant: detach it"):
        rope(x, table.clone().requires_grad_(), table)


@pytest.mark.parametrize("where", ON_GPU)
def test_flagship_shape(where):
    compare(where, "rope", "rope", (where.normal(2, 4096, 20, 64), *tables(where, 1, 4096, 32)), [0])


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    def make(tokens):
        return where.normal(2, tokens, 3, 8), *tables(where, 1, tokens, 4)

    assert_compiles(where, "rope", "rope", make, [0])
