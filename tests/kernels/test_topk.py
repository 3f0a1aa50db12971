"""topk_scores: every backend against the naive twin, and the twin against torch.topk and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    EVERYWHERE,
    ON_GPU,
    ONE_OF_EACH,
    TRITON_FLOAT32,
    Where,
    assert_bitwise_equal,
    assert_compiles,
    compare,
    opcheck,
)

from moe_kernels import KernelError
from moe_kernels.topk import reference, with_torch

SHAPES = [(0, 5, 2), (1, 5, 2), (63, 16, 4), (257, 5, 5), (63, 1, 1), (20, 64, 8)]  # T, E, K


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_naive_twin(where, tokens, experts, k, score, renormalize):
    torch.manual_seed(0)
    got = compare(where, "topk", "topk_scores", (where.normal(tokens, experts), k, score, renormalize), [0])
    weights, ids, scores, counts = got.outputs
    assert weights.dtype == scores.dtype == where.wide
    assert ids.dtype == counts.dtype == torch.int32
    assert counts.sum() == tokens * k


@given(st.integers(0, 40), st.integers(1, 20), st.data())
@settings(max_examples=10, deadline=None)
def test_any_shape_in_the_interpreter(tokens, experts, data):
    where, k = Where("triton", "cpu", torch.float32), data.draw(st.integers(1, experts))
    args = (where.normal(tokens, experts), k, data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans()))
    compare(where, "topk", "topk_scores", args, [0])


def test_twin_equals_torch_topk():
    logits = torch.randn(50, 12, dtype=torch.float64)
    got = reference.topk_scores(logits, 3)
    values, ids = logits.softmax(-1).topk(3)
    assert torch.equal(got.expert_ids, ids.int())
    torch.testing.assert_close(got.weights, values / values.sum(-1, keepdim=True), rtol=1e-14, atol=0)
    torch.testing.assert_close(got.weights, logits.topk(3).values.softmax(-1), rtol=1e-12, atol=0)
    assert torch.equal(got.tokens_per_expert, torch.bincount(ids.flatten(), minlength=12).int())


@pytest.mark.parametrize("op", [reference.topk_scores, with_torch.topk_scores], ids=["reference", "torch"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_by_finite_differences(op, score, renormalize):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x, 2, score, renormalize)[::2], logits)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_the_lower_id_wins_ties_and_the_larger_logit_wins_a_tie_of_scores(where):
    inf = float("inf")
    logits = [
        [1.0, 1.0, 1.0, 1.0],
        [0.0, 2.0, 2.0, -1.0],
        [0.0, -0.0, 0.0, -0.0],  # equal, though their bits differ
        [-0.0, 0.0, -0.0, 0.0],
        [-inf, 3.0, -inf, -inf],  # masked experts still get distinct ids
        [-1e-30, -1e-20, 1e-30, 1e-20],
        [50.0, 60.0, 55.0, -3.0],  # sigmoid gives 1.0 three times in fp32
        [-200.0, -190.0, -195.0, -300.0],  # softmax gives 0.0 twice, and sigmoid underflows everywhere
    ]
    expected = [[0, 1, 2], [1, 2, 0], [0, 1, 2], [0, 1, 2], [1, 0, 2], [3, 2, 0], [1, 2, 0], [1, 2, 0]]
    logits = torch.tensor(logits, device=where.device)
    for score in ("softmax", "sigmoid"):
        got = where.op("topk", "topk_scores")(logits, 3, score)
        assert got.expert_ids.tolist() == expected
        assert got.weights.isfinite().all()
        assert got.tokens_per_expert.tolist() == torch.tensor(expected).flatten().bincount(minlength=4).tolist()


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_renormalised_choice_has_weight_one_and_no_gradient(where, score):
    logits = where.normal(9, 6).requires_grad_()
    got = where.op("topk", "topk_scores")(logits, 1, score)
    assert (got.weights == 1).all()
    (grad,) = torch.autograd.grad((got.weights * torch.randn(9, 1, device=where.device)).sum(), logits)
    assert grad.abs().max() <= 1e-7
    got = where.op("topk", "topk_scores")(logits, 1, score, renormalize=False)
    (grad,) = torch.autograd.grad(got.weights.sum(), logits)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("logits", "k", "score", "message"),
    [
        (torch.zeros(4), 1, "softmax", r"logits must be a floating \[T, E\] matrix; got logits=\[4\]"),
        (torch.zeros(4, 3, dtype=torch.int32), 1, "softmax", "logits must be a floating"),
        (torch.zeros(4, 3), 4, "softmax", r"k must be in 1..E; got k=4, logits=\[4, 3\]"),
        (torch.zeros(4, 3), 0, "softmax", "k must be in 1..E"),
        (torch.zeros(4, 3), 1, "tanh", "score must be softmax or sigmoid; got score='tanh'"),
    ],
)
def test_bad_input(where, logits, k, score, message):
    with pytest.raises(KernelError, match=message):
        where.op("topk", "topk_scores")(logits.to(where.device), k, score)


@pytest.mark.parametrize("where", TRITON_FLOAT32)
def test_opcheck(where, monkeypatch):
    where.op("topk", "topk_scores")
    logits = where.normal(5, 6).requires_grad_()
    opcheck(monkeypatch, "topk_scores_triton", (logits, 2, False, True))
    opcheck(monkeypatch, "topk_scores_triton", (logits, 2, True, False))


@pytest.mark.parametrize("where", ON_GPU)
def test_flagship_shape(where):
    args = (where.normal(16_384, 16), 4)
    compare(where, "topk", "topk_scores", args, [0])
    assert_bitwise_equal(where, "topk", "topk_scores", args, [0])


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    assert_compiles(where, "topk", "topk_scores", lambda tokens: (where.normal(tokens, 8), 2), [0])
