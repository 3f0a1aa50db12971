"""score_topk: every backend against the naive twin, and the twin against torch.topk and finite differences."""

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
    assert_close,
    assert_compiles,
    compare,
)

from moe_kernels import KernelError
from moe_kernels.topk import reference, with_torch

SHAPES = [(0, 16, 5, 2), (1, 16, 5, 2), (63, 128, 16, 4), (257, 72, 5, 5), (63, 20, 1, 1), (20, 40, 64, 8)]  # T, P, E, K
WIDE = [
    *((70, 1280, 16, 4, "softmax"), (33, 100, 65, 8, "sigmoid"), (40, 64, 256, 8, "softmax")),
    *((17, 40, 520, 3, "sigmoid"), (18, 12, 1024, 4, "softmax")),
]
CLEAR_GAP = 1e-4  # between logits of O(1): beyond what the order of additions changes
OPERANDS = [0, 1]


def inputs(where, tokens, width, experts, k):
    """hidden in the compute dtype and a wide weight of values that it holds. A token whose ranking another order of additions
    might change gets a hidden row of zeros, hence equal logits."""
    hidden = where.normal(tokens, width)
    weight = where.normal(experts, width, scale=width**-0.5).to(where.wide)
    ranked = (hidden.double() @ weight.double().T).sort(1, descending=True).values[:, : k + 1]
    hidden[((ranked[:, :-1] - ranked[:, 1:]) < CLEAR_GAP).any(1)] = 0
    return hidden, weight


def check(where, tokens, width, experts, k, *options):
    got = compare(where, "topk", "score_topk", (*inputs(where, tokens, width, experts, k), k, *options), OPERANDS)
    weights, ids, scores, counts, logits = got.outputs
    assert weights.dtype == scores.dtype == logits.dtype == where.wide
    assert ids.dtype == counts.dtype == torch.int32
    assert counts.sum() == tokens * k


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "width", "experts", "k"), SHAPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_naive_twin(where, tokens, width, experts, k, score, renormalize):
    torch.manual_seed(0)
    check(where, tokens, width, experts, k, score, renormalize)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "width", "experts", "k", "score"), WIDE)
def test_equals_the_naive_twin_where_wide(where, tokens, width, experts, k, score):
    torch.manual_seed(0)
    check(where, tokens, width, experts, k, score)


@given(st.integers(0, 70), st.integers(1, 140), st.integers(1, 20), st.data())
@settings(max_examples=10, deadline=None)
def test_any_shape_in_the_interpreter(tokens, width, experts, data):
    k = data.draw(st.integers(1, experts))
    options = data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans())
    check(Where("triton", "cpu", torch.float32), tokens, width, experts, k, *options)


@pytest.mark.parametrize("where", TRITON)
def test_ranges_of_several_blocks_of_tokens(where, monkeypatch):
    where.op("topk", "score_topk")
    monkeypatch.setattr("moe_kernels.topk.with_triton._ranges", lambda constants: 2)
    check(where, 400, 24, 6, 2)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_logits_are_not_rounded_but_the_weight_is(where):
    torch.manual_seed(0)
    hidden = where.normal(65, 136)
    weight = torch.randn(16, 136, dtype=where.wide, device=where.device)
    got = where.op("topk", "score_topk")(hidden, weight, 2)
    truth = hidden.double() @ weight.to(where.dtype).double().T
    assert_close(got.logits, truth, (1e-6, 2e-6), "logits")
    assert_close(got.scores, truth.softmax(-1), (2e-6, 1e-5), "scores")


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["weights", "scores", "logits"])
def test_each_output_alone_carries_a_gradient(where, score, name):
    torch.manual_seed(0)
    operands = inputs(where, 9, 24, 6, 2)

    def grads(op, operands):
        leaves = [value.detach().clone().requires_grad_() for value in operands]
        value = getattr(op(*leaves, 2, score), name)
        scale = torch.arange(1.0, 1.0 + value.numel(), device=where.device).view_as(value)
        return torch.autograd.grad((value * scale).sum(), leaves)

    truth = grads(reference.score_topk, [value.double() for value in operands])
    for mine, exact in zip(grads(where.op("topk", "score_topk"), operands), truth, strict=True):
        assert_close(mine, exact, (2e-6, 2e-5), name)


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("learns", OPERANDS)
def test_a_frozen_operand_gets_no_gradient(where, learns):
    torch.manual_seed(0)
    operands = inputs(where, 9, 24, 6, 2)
    operands[learns].requires_grad_()
    (grad,) = torch.autograd.grad(where.op("topk", "score_topk")(*operands, 2).weights[:, 0].sum(), operands[learns])
    (truth,) = torch.autograd.grad(reference.score_topk(*operands, 2).weights[:, 0].sum(), operands[learns])
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_strided_operands(where):
    """Columns of a wider state (an LSTM's), and a weight that is stored transposed."""
    state, stored = where.normal(9, 48), where.normal(24, 6)
    op = where.op("topk", "score_topk")
    mine = op(state[:, :24], stored.T, 2)
    for a, b in zip(mine, op(state[:, :24].contiguous(), stored.T.contiguous(), 2), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", TRITON_FLOAT32)
def test_nothing_around_the_operands_is_read(where):
    """NaN before and after both; sizes that no tile divides."""

    def surround(value):
        buffer = torch.full((value.numel() + 2,), float("nan"), device=where.device)
        buffer[1:-1] = value.flatten()
        return buffer[1:-1].view(value.shape).requires_grad_()

    torch.manual_seed(0)
    operands = inputs(where, 70, 70, 5, 2)
    surrounded = [surround(value) for value in operands]
    got = where.op("topk", "score_topk")(*surrounded, 2)
    truth = reference.score_topk(*operands, 2)
    torch.testing.assert_close(got.logits, truth.logits)
    for grad in torch.autograd.grad(got.weights[:, 0].sum(), surrounded):
        assert grad.isfinite().all()


def test_twin_equals_torch_topk():
    hidden, weight = torch.randn(50, 7, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)
    got, logits = reference.score_topk(hidden, weight, 3), hidden @ weight.T
    values, ids = logits.softmax(-1).topk(3)
    assert torch.equal(got.logits, logits)
    assert torch.equal(got.expert_ids, ids.int())
    torch.testing.assert_close(got.weights, values / values.sum(-1, keepdim=True), rtol=1e-14, atol=0)
    torch.testing.assert_close(got.weights, logits.topk(3).values.softmax(-1), rtol=1e-12, atol=0)
    assert torch.equal(got.tokens_per_expert, torch.bincount(ids.flatten(), minlength=12).int())


@pytest.mark.parametrize("op", [reference.score_topk, with_torch.score_topk], ids=["reference", "torch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_by_finite_differences(op, score, renormalize):
    torch.manual_seed(0)
    operands = [value.requires_grad_() for value in inputs(Where("torch", "cpu", torch.float64), 3, 4, 5, 2)]
    assert torch.autograd.gradcheck(lambda *leaves: op(*leaves, 2, score, renormalize)[::2], operands)


def test_only_operands_scores_and_choice_are_saved():
    where = Where("torch", "cpu", torch.float32)
    operands = [value.requires_grad_() for value in inputs(where, 5, 8, 6, 2)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        got = with_torch.score_topk(*operands, 2)
    kept = (*operands, got.weights, got.expert_ids, got.scores)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in kept}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_the_lower_id_wins_ties_and_the_larger_logit_wins_a_tie_of_scores(where):
    logits = [
        [1.0, 1.0, 1.0, 1.0],
        [0.0, 2.0, 2.0, -1.0],
        [0.0, -0.0, 0.0, -0.0],
        [-1e-30, -1e-20, 1e-30, 1e-20],
        [50.0, 60.0, 55.0, -3.0],  # sigmoid gives 1.0 three times in fp32
        [-200.0, -190.0, -195.0, -300.0],  # softmax gives 0.0 twice, and sigmoid underflows everywhere
    ]
    expected = [[0, 1, 2], [1, 2, 0], [0, 1, 2], [3, 2, 0], [1, 2, 0], [1, 2, 0]]
    hidden, identity = torch.tensor(logits, device=where.device), torch.eye(4, device=where.device)
    for score in ("softmax", "sigmoid"):
        got = where.op("topk", "score_topk")(hidden, identity, 3, score)
        assert torch.equal(got.logits, hidden)
        assert got.expert_ids.tolist() == expected
        assert got.weights.isfinite().all()
        assert got.tokens_per_expert.tolist() == torch.tensor(expected).flatten().bincount(minlength=4).tolist()


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_the_sum_of_selected_scores_is_a_constant_where_it_is_the_smallest(where):
    """Two scores of about 4e-21 are divided by 1e-20, through which no gradient flows."""
    hidden = torch.tensor([[-47.0, -47.2, -60.0, -80.0]], device=where.device)
    args = (hidden, torch.eye(4, device=where.device), 2, "sigmoid")
    got = compare(where, "topk", "score_topk", args, OPERANDS, tolerance=(1e-5, 1e-4))
    assert 0.6 < got.outputs[0].sum().item() < 0.8


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_renormalised_choice_has_weight_one_and_no_gradient(where, score):
    hidden, weight = inputs(where, 9, 8, 6, 1)
    hidden.requires_grad_()
    got = where.op("topk", "score_topk")(hidden, weight, 1, score)
    assert (got.weights == 1).all()
    (grad,) = torch.autograd.grad((got.weights * torch.randn(9, 1, device=where.device)).sum(), hidden)
    assert grad.abs().max() <= 1e-6
    got = where.op("topk", "score_topk")(hidden, weight, 1, score, renormalize=False)
    (grad,) = torch.autograd.grad(got.weights.sum(), hidden)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("hidden", "weight", "k", "score", "message"),
    [
        (torch.zeros(4), torch.zeros(3, 4), 1, "softmax", r"hidden must be a floating \[T, P\] matrix; got hidden=\[4\]"),
        (torch.zeros(4, 2).int(), torch.zeros(3, 2), 1, "softmax", "hidden must be a floating"),
        (
            torch.zeros(4, 2),
            torch.zeros(2, 3),
            1,
            "softmax",
            r"weight must be a floating \[E, P\] .*weight=\[2, 3\].*=\[4, 2\]",
        ),
        (torch.zeros(4, 2), torch.zeros(3, 2).int(), 1, "softmax", "weight must be a floating"),
        (torch.zeros(4, 2), torch.zeros(3, 2), 4, "softmax", r"k must be in 1..E; got k=4, weight=\[3, 2\]"),
        (torch.zeros(4, 2), torch.zeros(3, 2), 0, "softmax", "k must be in 1..E"),
        (torch.zeros(4, 2), torch.zeros(3, 2), 1, "tanh", "score must be softmax or sigmoid; got score='tanh'"),
    ],
)
def test_bad_input(where, hidden, weight, k, score, message):
    with pytest.raises(KernelError, match=message):
        where.op("topk", "score_topk")(hidden.to(where.device), weight.to(where.device), k, score)


@pytest.mark.parametrize("where", TRITON_FLOAT32)
def test_what_the_triton_backend_refuses(where):
    with pytest.raises(KernelError, match=r"the triton backend takes E up to 1024.* \(else use the torch backend\)"):
        where.op("topk", "score_topk")(where.normal(4, 2), where.normal(1025, 2), 2)


@pytest.mark.parametrize("where", ON_GPU)
@pytest.mark.parametrize(("width", "experts", "k"), [(128, 16, 4), (1280, 16, 4), (2048, 128, 8)])
def test_flagship_shape(where, width, experts, k):
    args = (*inputs(where, 16_384, width, experts, k), k)
    compare(where, "topk", "score_topk", args, OPERANDS)
    assert_bitwise_equal(where, "topk", "score_topk", args, OPERANDS)


@pytest.mark.parametrize("where", TRITON_FLOAT32)
def test_two_runs_are_bitwise_equal(where):
    args = (*inputs(where, 300, 40, 16, 4), 4)
    assert_bitwise_equal(where, "topk", "score_topk", args, OPERANDS)


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    assert_compiles(where, "topk", "score_topk", lambda tokens: (*inputs(where, tokens, 24, 8, 2), 2), OPERANDS)
