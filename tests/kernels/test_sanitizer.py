"""Every kernel once on small, ragged shapes: what `make test-gpu` runs under compute-sanitizer's memcheck and racecheck."""

import pytest
import torch

from moe_kernels import get_backend

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return get_backend("triton", "cuda")


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def backward(*outputs):
    sum(out.float().square().sum() for out in outputs if out.requires_grad).backward()
    torch.cuda.synchronize()


def choices(tokens, experts, k):
    ids = torch.stack([torch.randperm(experts, device="cuda")[:k] for _ in range(tokens)]).int()
    ids[::5, 0] = -1
    return ids


def test_sanitizer_moe_mlp(ops):
    x, gate_up, down, weights = draw(70, 72), draw(3, 80, 72), draw(3, 72, 40), draw(70, 2, dtype=torch.float32)
    backward(ops.moe_mlp(x, gate_up, down, choices(70, 3, 2), weights))


def test_sanitizer_permutation_and_grouped_mm(ops):
    plan = ops.sort_by_expert(choices(70, 5, 2), 5)
    rows = ops.grouped_mm(ops.permute(draw(70, 72), plan), draw(5, 40, 72), plan)
    backward(ops.unpermute(rows, plan, draw(70, 2, dtype=torch.float32)))


def test_sanitizer_router(ops):
    z, h = draw(70, 48), draw(70, 48, dtype=torch.float32)
    cell = [draw(*shape, dtype=torch.float32) for shape in ((144, 48), (144, 48), (144,), (144,))]
    state = ops.gru_step(z, h, *cell)
    choice = ops.score_topk(state.bfloat16(), draw(5, 48, dtype=torch.float32), 2)
    backward(choice.weights, choice.scores, choice.logits)


def test_sanitizer_layer(ops):
    x, branch, norm = draw(2, 35, 72), draw(2, 35, 72), draw(72, dtype=torch.float32)
    total, normed = ops.add_rms_norm(x, branch, norm, 1e-5)
    angles = torch.rand(2, 35, 12, device="cuda")
    turned = ops.rope(ops.rms_norm(normed, norm, 1e-5).view(2, 35, 3, 24), angles.cos(), angles.sin())
    backward(total, ops.swiglu(turned.reshape(2, 35, 72)))


def test_sanitizer_linear_cross_entropy(ops):
    target = torch.randint(0, 300, (70,), device="cuda")
    coef = torch.rand(70, device="cuda")
    loss, _ = ops.linear_cross_entropy(draw(70, 72), draw(300, 72), target, coef, chunk=32)
    backward(loss)
