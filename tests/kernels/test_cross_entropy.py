"""linear_cross_entropy: every backend against the naive twin, the twin against torch, and vocabulary shards against the whole."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from twins import (
    EVERYWHERE,
    ON_GPU,
    ONE_OF_EACH,
    TRITON,
    Where,
    assert_bitwise_equal,
    assert_close,
    assert_compiles,
    compare,
    run,
)

from moe_kernels import KernelError
from moe_kernels.cross_entropy import reference, with_torch

ARGS = ("cross_entropy", "linear_cross_entropy")


def inputs(where, tokens, hidden, vocab):
    """x, w, target, coef; every fifth token is ignored and has an impossible target."""
    coef = torch.rand(tokens) + 0.25
    target = torch.randint(0, vocab, (tokens,))
    coef[4::5], target[4::5] = 0, -100
    device = where.device
    return where.normal(tokens, hidden), where.normal(vocab, hidden, scale=hidden**-0.5), target.to(device), coef.to(device)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "chunk"),
    [(0, 8, 5, None), (1, 8, 1, None), (63, 40, 257, None), (63, 16, 1000, 20), (257, 24, 37, 300), (5, 16, 9000, None)],
)
def test_equals_the_naive_twin(where, tokens, hidden, vocab, chunk):
    torch.manual_seed(0)
    got = compare(where, *ARGS, inputs(where, tokens, hidden, vocab), [0, 1], chunk=chunk)
    loss, token_loss = got.outputs
    assert loss.shape == ()
    assert loss.dtype == token_loss.dtype == where.wide
    assert not token_loss.requires_grad
    assert not token_loss[4::5].any()


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 100), st.integers(1, 30))
@settings(max_examples=5, deadline=None)
def test_any_shape_in_the_interpreter(tokens, hidden, vocab, chunk):
    where = Where("triton", "cpu", torch.float32)
    compare(where, *ARGS, inputs(where, tokens, hidden, vocab), [0, 1], chunk=chunk)


@pytest.mark.parametrize("op", [reference.linear_cross_entropy, with_torch.linear_cross_entropy], ids=["reference", "torch"])
def test_equals_torch_cross_entropy(op):
    x, w, target, _ = inputs(Where("torch", "cpu", torch.float64), 31, 12, 50)
    x.requires_grad_()
    w.requires_grad_()
    count = (target != -100).sum()
    truth = F.cross_entropy(x @ w.T, target, ignore_index=-100)
    mine, token_loss = op(x, w, target, (target != -100).double() / count, chunk=7)
    torch.testing.assert_close(mine, truth, rtol=1e-13, atol=0)
    torch.testing.assert_close(token_loss, F.cross_entropy(x @ w.T, target, reduction="none").detach(), rtol=1e-12, atol=1e-13)
    for got, expected in zip(torch.autograd.grad(mine * 3, [x, w]), torch.autograd.grad(truth * 3, [x, w]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("op", [reference.linear_cross_entropy, with_torch.linear_cross_entropy], ids=["reference", "torch"])
def test_gradient_by_finite_differences(op):
    x, w, target, coef = inputs(Where("torch", "cpu", torch.float64), 4, 3, 6)
    args = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: op(x, w, target, coef.double(), chunk=3)[0], args)


class Exchange:
    """What the shards of a group send and receive, without processes: every pass runs all shards on what the pass before recorded.

    The first pass records the maxima, the second the sums that belong to them; the third is right.
    """

    def __init__(self, previous=None):
        self.sent = {}  # (kind, call) -> one tensor per shard
        self.previous = previous
        self.calls = {}

    def shard(self):
        self.calls = {"max": 0, "sum": 0}
        return self

    def _combine(self, kind, x, how):
        key = (kind, self.calls[kind])
        self.calls[kind] += 1
        self.sent.setdefault(key, []).append(x.clone())
        return how(torch.stack(self.previous.sent[key])) if self.previous else x

    def max(self, x):
        return self._combine("max", x, lambda all_shards: all_shards.amax(0))

    def sum(self, x):
        return self._combine("sum", x, lambda all_shards: all_shards.sum(0))


@pytest.mark.parametrize("where", [*ONE_OF_EACH, *(where for where in EVERYWHERE if where.values[0].dtype == torch.float64)])
@pytest.mark.parametrize("chunk", [None, 8])
def test_shards_of_the_vocabulary_equal_the_whole(where, chunk):
    torch.manual_seed(0)
    op = where.op(*ARGS)
    x, w, target, coef = inputs(where, 21, 16, 50)
    w[30:] += 1  # so that the shards' maxima differ
    whole = run(op, (x, w, target, coef), [0, 1], chunk=chunk)
    shards = ((0, 30), (30, 33), (33, 50))
    exchange = None
    for _ in range(3):
        exchange = Exchange(exchange)
        parts = [
            run(op, (x, w[a:b], target, coef), [0, 1], reduce=exchange.shard(), vocab_start=a, chunk=chunk) for a, b in shards
        ]
    close = (1e-13, 1e-12) if where.dtype == torch.float64 else (2e-6, 2e-5)
    for part in parts:
        assert_close(part.outputs[0], whole.outputs[0], close, "loss")
        assert_close(part.outputs[1], whole.outputs[1], close, "token losses")
    assert_close(sum(part.grads[0] for part in parts), whole.grads[0], close, "x's gradient, summed by the caller")
    assert_close(torch.cat([part.grads[1] for part in parts]), whole.grads[1], close, "w's gradient")
    calls = 1 if chunk is None or where.backend == "reference" else 3
    assert sorted(exchange.sent) == sorted((kind, call) for kind in ("max", "sum") for call in range(calls))


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_large_logits_do_not_overflow(where):
    x, w, target, coef = inputs(where, 10, 8, 30)
    compare(where, *ARGS, (x * 1000, w, target, coef), [0, 1], tolerance=(1e-4, 1e-3))  # logits round at 1e-4


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_without_gradients_only_the_losses_are_computed(where):
    op, (x, w, target, coef) = where.op(*ARGS), inputs(where, 10, 8, 30)
    truth = op(x.requires_grad_(), w.requires_grad_(), target, coef)
    with torch.no_grad():
        got = op(x, w, target, coef, chunk=3)
    assert not got[0].requires_grad
    torch.testing.assert_close(got[0], truth[0].detach())
    torch.testing.assert_close(got[1], truth[1])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_full_logits_never_exist(backend):
    """At the flagship's vocabulary, on meta tensors: what is largest are the logits of one chunk, or the weight's gradient."""
    tokens, hidden, vocab = 65_536, 1280, 96_512
    x, w = (torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True) for rows in (tokens, vocab))
    target, coef = torch.empty(tokens, dtype=torch.int64, device="meta"), torch.empty(tokens, device="meta")
    op = importlib.import_module(f"moe_kernels.cross_entropy.with_{backend}").linear_cross_entropy
    for chunk, most in ((None, 8_289), (1_000, 1_280)):
        with Largest() as largest:
            op(x, w, target, coef, chunk=chunk)[0].backward()
        assert vocab * hidden <= largest.numel <= most * vocab


@pytest.mark.parametrize("where", ONE_OF_EACH)
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_frozen_argument(where, frozen):
    op, args = where.op(*ARGS), inputs(where, 10, 8, 30)
    args[1 - frozen].requires_grad_()
    loss = op(*args)[0]
    (grad,) = torch.autograd.grad(loss, args[1 - frozen])
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(*args)[0], args[1 - frozen])
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_recomputation_and_two_uses_in_one_graph(where):
    op, (x, w, target, coef) = where.op(*ARGS), inputs(where, 10, 8, 30)

    def twice(x, w):
        return op(x, w, target, coef)[0] + 2 * op(x, w, target, coef, chunk=4)[0]

    x, w = x.requires_grad_(), w.requires_grad_()
    plain = torch.autograd.grad(twice(x, w), [x, w])
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(twice, x, w, use_reentrant=False), [x, w])
    once = torch.autograd.grad(reference.linear_cross_entropy(x, w, target, coef)[0], [x, w])
    for a, b, c in zip(plain, again, once, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_a_target_that_nobody_holds(where):
    op, (x, w, target, coef) = where.op(*ARGS), inputs(where, 6, 8, 30)
    target[2] = 30
    if where.device == "cpu":
        with pytest.raises(KernelError, match=r"target\[2\] = 30 is outside of the vocabulary 0..29"):
            op(x, w, target, coef)
    x, target = x.requires_grad_(), target + 1000
    loss, token_loss = op(x, w, target, coef, vocab_start=1000)  # as a shard: no shard sees the whole vocabulary
    assert loss.isnan()
    assert token_loss.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("where", ONE_OF_EACH)
def test_bad_input(where):
    op, (x, w, target, coef) = where.op(*ARGS), inputs(where, 6, 8, 30)
    for args, message in (
        ((x, w[:, :7], target, coef), r"x \[T, D\] and w \[V, D\] must have one floating dtype and one device; got x=\[6, 8\]"),
        ((x, w.half(), target, coef), "must have one floating dtype"),
        ((x, w[:0], target, coef), "w holds no vocabulary row"),
        ((x, w, target[:5], coef), r"target must be \[T\]"),
        ((x, w, target.int(), coef), r"target must be int64 \(use target.long\(\)\)"),
        ((x, w, target, coef.clone().requires_grad_()), "coef must be constant"),
    ):
        with pytest.raises(KernelError, match=message):
            op(*args)
    with pytest.raises(KernelError, match="chunk must be at least 1 token"):
        op(x, w, target, coef, chunk=0)


@pytest.mark.parametrize("where", TRITON)
def test_two_runs_are_bitwise_equal(where):
    args = inputs(where, 40, 24, 300)
    assert_bitwise_equal(where, *ARGS, args, [0, 1], chunk=16)


@pytest.mark.parametrize("where", ON_GPU)
def test_flagship_vocabulary(where):
    args = inputs(where, 1000, 1280, 96_512)
    compare(where, *ARGS, args, [0, 1], chunk=384)
    assert_bitwise_equal(where, *ARGS, args, [0, 1], chunk=384)


@pytest.mark.slow
@pytest.mark.parametrize("where", ONE_OF_EACH[1:])
def test_compiles(where):
    assert_compiles(where, *ARGS, lambda tokens: inputs(where, tokens, 16, 30), [0, 1])
