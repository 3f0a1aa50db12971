"""The last tokens of a batch whose tensors have more than 2^31 elements: what they get there is what they get alone.

On a GPU; the CPU's batch is small and tries the test itself.
"""

import pytest
import torch

from moe_kernels import get_backend, launch

WIDTH, E, K, LAST = 512, 4, 2, 64


def normal(*shape, device, dtype=torch.bfloat16):
    return torch.randn(*shape, device=device, dtype=dtype) / 2


def make_calls(ops, device, low):
    """Name -> (shapes of what each token has, function of those; the gradient of its output is ones)."""
    wide = torch.float32
    norm, table = normal(WIDTH, device=device, dtype=wide), normal(1, 1, 64, device=device, dtype=wide)
    scorer, w = normal(16, WIDTH, device=device, dtype=wide), normal(E, 64, WIDTH, device=device, dtype=low) / 8
    cell = [normal(*shape, device=device, dtype=wide) / 8 for shape in ((384, 128), (384, 128), (384,), (384,))]
    head = normal(1024, 64, device=device, dtype=low)

    def ids(x):
        """Of a token's own numbers, so that it has the same experts alone."""
        first = (x.detach()[:, 0].float().abs() * 64).int() % E
        return torch.stack([first, (first + 1) % E], 1).contiguous()

    def permuted(x, weights):
        plan = ops.sort_by_expert(ids(x), E)
        return ops.unpermute(ops.permute(x, plan), plan, weights)

    def product(x):
        plan = ops.sort_by_expert(ids(x), E)
        return ops.unpermute(ops.grouped_mm(ops.permute(x, plan), w, plan), plan, None)

    def turned(x):
        angles = table.expand(1, len(x), 64)
        return ops.rope(x[None], angles.cos(), angles.sin())[0]

    def loss(x):
        target = torch.arange(1024, device=device)[(x.detach()[:, 0].float().abs() * 64).long()]
        return ops.linear_cross_entropy(x, head, target, torch.ones(len(x), device=device), chunk=len(x))[0]

    return {
        "permute, unpermute": ([(WIDTH, low), (K, wide)], permuted),
        "grouped_mm": ([(WIDTH, low)], product),
        "score_topk": ([(WIDTH, low)], lambda x: ops.score_topk(x, scorer, K).scores),
        "gru_step": ([(128, low), (128, wide)], lambda z, h: ops.gru_step(z, h, *cell)),
        "rms_norm": ([(WIDTH, low)], lambda x: ops.rms_norm(x, norm, 1e-6)),
        "add_rms_norm": ([(WIDTH, low), (WIDTH, low)], lambda x, branch: ops.add_rms_norm(x, branch, norm, 1e-6)[1]),
        "rope": ([((4, 128), low)], turned),
        "swiglu": ([(2 * WIDTH, low)], lambda x: ops.swiglu(x)),
        "linear_cross_entropy": ([(64, low)], loss),
    }


NAMES = list(make_calls(None, "cpu", torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_last_tokens_are_as_they_are_alone(name, device, monkeypatch):
    cuda = device.type == "cuda"
    if cuda and torch.cuda.get_device_properties(device).total_memory < 100e9:
        pytest.skip("needs 100 GB")
    tokens, low = (2**22 + LAST, torch.bfloat16) if cuda else (LAST + 40, torch.float16)
    if cuda:
        monkeypatch.setattr(launch, "_allocate", torch.empty)  # the poisoned buffers are kept until the test ends
        assert tokens * WIDTH > 2**31
    torch.manual_seed(0)
    shapes, call = make_calls(get_backend("triton", device), device, low)[name]
    sizes = [shape if isinstance(shape, tuple) else (shape,) for shape, _ in shapes]
    leaves = [normal(tokens, *size, device=device, dtype=dtype) for size, (_, dtype) in zip(sizes, shapes, strict=True)]

    def of_the_last(leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [value[-LAST:].clone() for value in ([out.detach()] if out.dim() else []) + [*grads]]

    for mine, alone in zip(of_the_last(leaves), of_the_last([leaf[-LAST:] for leaf in leaves]), strict=True):
        torch.testing.assert_close(mine, alone, rtol=2e-2, atol=2e-3)
        assert alone.any()
