"""gru_step: every backend against the naive twin, the twin against torch.nn.GRUCell, and the recurrent router's hand-computed cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    EVERYWHERE,
    ON_GPU,
    ONE_OF_EACH,
    TRITON,
    TRITON_FLOAT32,
    Where,
    assert_bitwise_equal,
    assert_compiles,
    compare,
)

from moe_kernels import KernelError
from moe_kernels.gru import reference, with_torch

EXACT = pytest.mark.parametrize("op", [reference.gru_step, with_torch.gru_step], ids=["reference", "torch"])


def inputs(where, tokens, width):
    """z in the compute dtype, and values that it holds exactly where the op rounds them (h, w_ih, w_hh)."""
    scale = width**-0.5
    rounded = [where.normal(tokens, width), where.normal(tokens, width, scale=0.5)]
    rounded += [where.normal(3 * width, width, scale=scale) for _ in range(2)]
    z, *others = rounded
    return [
        z,
        *(value.to(where.wide) for value in others),
        *(where.normal(3 * width, scale=scale, wide=True) for _ in range(2)),
    ]


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 8), (63, 40), (257, 24), (20, 32)])
def test_equals_the_naive_twin(where, tokens, width):
    torch.manual_seed(0)
    got = compare(where, "gru", "gru_step", inputs(where, tokens, width), range(6))
    assert got.outputs[0].dtype == where.wide


@pytest.mark.slow
@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "width"), [(20, 64), (63, 128), (65, 72), (1100, 16)])
def test_equals_the_naive_twin_at_more_shapes(where, tokens, width):
    torch.manual_seed(0)
    compare(where, "gru", "gru_step", inputs(where, tokens, width), range(6))


@given(st.integers(0, 70), st.integers(1, 50))
@settings(max_examples=3, deadline=None)
def test_any_shape_in_the_interpreter(tokens, width):
    where = Where("triton", "cpu", torch.float32)
    compare(where, "gru", "gru_step", inputs(where, tokens, width), range(6))


@pytest.mark.parametrize("where", TRITON)
def test_ranges_of_several_blocks_of_tokens(where, monkeypatch):
    where.op("gru", "gru_step")
    monkeypatch.setattr("moe_kernels.gru.with_triton._RANGES", 2)
    compare(where, "gru", "gru_step", inputs(where, 150, 24), range(6))


@EXACT
def test_equals_torch_gru_cell(op):
    cell = torch.nn.GRUCell(16, 16).double()
    z, h = (torch.randn(33, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = [z, h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    mine, truth = op(*leaves), cell(z, h)
    upstream = torch.randn_like(truth)
    torch.testing.assert_close(mine, truth, rtol=0, atol=1e-12)
    pairs = zip(torch.autograd.grad(mine, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@EXACT
def test_gradient_by_finite_differences(op):
    torch.manual_seed(0)
    args = [value.requires_grad_() for value in inputs(Where("torch", "cpu", torch.float64), 3, 4)]
    assert torch.autograd.gradcheck(op, args)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_unit_weights_over_four_layers(where):
    """P = 1, all weights 1, biases 0 and z = 1 at every layer; without the passing of states the first value repeats."""
    one, zero = torch.ones(3, 1, device=where.device), torch.zeros(3, device=where.device)
    z = torch.ones(1, 1, device=where.device)
    h = torch.zeros(1, 1, device=where.device)
    for expected in (0.204824, 0.346753, 0.451697, 0.532541):
        h = where.op("gru", "gru_step")(z, h, one, one, zero, zero)
        assert h.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_saturated_and_empty_cells(where):
    step, width = where.op("gru", "gru_step"), 8
    z, h, w_ih, w_hh, b_ih, b_hh = inputs(where, 5, width)
    empty, none = torch.zeros_like(h), torch.zeros_like(b_ih)
    assert not step(z, empty, torch.zeros_like(w_ih), torch.zeros_like(w_hh), none, none).any()
    torch.testing.assert_close(step(z, h, torch.zeros_like(w_ih), torch.zeros_like(w_hh), none, none), h / 2)
    closed, opened = none.clone(), none.clone()
    closed[width : 2 * width], opened[width : 2 * width] = 1e4, -1e4
    assert not step(z, empty, w_ih, w_hh, closed, b_hh).any()  # the update gate keeps the empty state
    without_state = w_hh.clone()
    without_state[2 * width :] = 0
    expected = torch.tanh(z @ w_ih[2 * width :].T)  # a memoryless router of one layer
    torch.testing.assert_close(step(z, h, w_ih, without_state, opened, none), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_state_passes_gradients_between_layers_unless_it_is_zero_or_detached(where):
    """Four layers, loss on the last state: the first input counts only where the state is passed with its graph."""
    step = where.op("gru", "gru_step")
    _, _, *weights = inputs(where, 5, 8)
    for mode in ("pass", "detach", "none"):
        z = [where.normal(5, 8).requires_grad_() for _ in range(4)]
        leaves = [weight.clone().requires_grad_() for weight in weights]
        h = torch.zeros(5, 8, device=where.device)
        for layer in z:
            h = step(layer, {"pass": h, "detach": h.detach(), "none": torch.zeros_like(h)}[mode], *leaves)
        first, w_hh = torch.autograd.grad(h.square().sum(), [z[0], leaves[1]], allow_unused=True)
        assert (first is not None and first.any().item()) == (mode == "pass")
        assert w_hh.any().item() == (mode != "none")


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_tokens_do_not_mix(where):
    step = where.op("gru", "gru_step")
    z, h, *weights = inputs(where, 66, 16)
    whole, order = step(z, h, *weights), torch.randperm(66)
    torch.testing.assert_close(step(z[order], h[order], *weights), whole[order], rtol=1e-6, atol=1e-6)
    z[7] += 1
    changed = (step(z, h, *weights) != whole).any(1).nonzero().flatten()
    assert changed.tolist() == [7]


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_strided_operands(where):
    """Every operand as a slice of something wider: it is read by its strides, in backward too."""
    step, args = where.op("gru", "gru_step"), inputs(where, 5, 8)
    sliced = [torch.stack([value, torch.full_like(value, float("nan"))], -1)[..., 0] for value in args]
    assert not any(value.is_contiguous() for value in sliced)

    def results(values):
        leaves = [value.detach().requires_grad_() for value in values]
        out = step(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for got, plain in zip(results(sliced), results(args), strict=True):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_frozen_weights_get_no_gradient(where):
    args = inputs(where, 5, 8)
    args[0].requires_grad_()
    (grad,) = torch.autograd.grad(where.op("gru", "gru_step")(*args).sum(), args[0])
    (truth,) = torch.autograd.grad(reference.gru_step(*args).sum(), args[0])
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


def test_only_z_and_h_are_saved():
    args = [value.requires_grad_() for value in inputs(Where("torch", "cpu", torch.float32), 5, 8)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with_torch.gru_step(*args)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in args}


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_bad_input(where):
    step = where.op("gru", "gru_step")
    z, h, w_ih, w_hh, b_ih, b_hh = inputs(where, 5, 8)
    with pytest.raises(KernelError, match=r"z must be floating \[T, I\] and h floating \[T, P\]; got z=\[5, 8\] .*h=\[4, 8\]"):
        step(z, h[:4], w_ih, w_hh, b_ih, b_hh)
    with pytest.raises(KernelError, match=r"w_hh must be \[24, 8\] \(order r, z, n\)"):
        step(z, h, w_ih, w_hh[:16], b_ih, b_hh)
    with pytest.raises(KernelError, match="the state is never rounded"):
        step(z, h.half(), w_ih, w_hh, b_ih, b_hh)


@pytest.mark.parametrize("where", TRITON_FLOAT32)
def test_two_runs_are_bitwise_equal(where):
    args = inputs(where, 300, 16)
    assert_bitwise_equal(where, "gru", "gru_step", args, range(6))


@pytest.mark.parametrize("where", ON_GPU)
@pytest.mark.parametrize("width", [128, 256])
def test_flagship_shape(where, width):
    args = inputs(where, 16_384, width)
    compare(where, "gru", "gru_step", args, range(6))
    assert_bitwise_equal(where, "gru", "gru_step", args, range(6))


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    assert_compiles(where, "gru", "gru_step", lambda tokens: inputs(where, tokens, 16), range(6))
