"""Inputs, routings and tolerances of the expert kernels' tests. T tokens, K choices, E experts, D hidden, F expert hidden."""

import torch
from hypothesis import strategies as st

# max |error| / max |reference| and ||error|| / ||reference||, both in the Frobenius sense, against fp64 of the same rounded inputs
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.float16: (6e-3, 1e-3),
    torch.bfloat16: (3e-2, 6e-3),
}
ROUTINGS = ("uniform", "zipf", "one", "holes", "none", "duplicates")


def dtypes(device):
    """What is tested on a device: the interpreter's bf16 is wrong, so bf16 is for GPUs."""
    return (torch.float32, torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32, torch.float16)


@st.composite
def routings(draw):
    """Tokens, experts, choices and one of ROUTINGS."""
    num_experts = draw(st.integers(1, 9))
    return draw(st.integers(0, 80)), num_experts, draw(st.integers(1, min(4, num_experts))), draw(st.sampled_from(ROUTINGS))


def route(tokens, num_experts, top_k, mode="uniform", seed=0):
    """Expert ids [T, K] int32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.ones(num_experts) if mode != "zipf" else 1.0 / torch.arange(1, num_experts + 1)
    score = torch.rand(tokens, num_experts, generator=generator) ** (1.0 / popularity)
    ids = score.topk(top_k, dim=1).indices.int()
    if mode == "one":
        ids[:] = num_experts - 1
    if mode == "none":
        ids[:] = -1
    if mode == "duplicates":
        ids = torch.randint(0, num_experts, ids.shape, generator=generator).int()
    if mode == "holes":  # empty slots, whole tokens without an expert, and the first and the last expert without rows
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
        ids[torch.rand(tokens, generator=generator) < 0.1] = -1
        ids[(ids == 0) | (ids == num_experts - 1)] = -1
    return ids


def assert_close(actual, expected, dtype, name=""):
    """Compare with an fp64 reference by the tolerance of `dtype`; an all-zero reference must be met exactly."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, name
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if expected.numel() == 0 or not expected.any():
        assert not actual.any(), f"{name}: should be zero"
        return
    difference = actual - expected
    largest = float(difference.abs().max() / expected.abs().max())
    overall = float(difference.norm() / expected.norm())
    limit_largest, limit_overall = TOLERANCE[dtype]
    assert largest <= limit_largest, f"{name}: largest error {largest:.1e} of the largest entry, at most {limit_largest:.0e}"
    assert overall <= limit_overall, f"{name}: error {overall:.1e} of the norm, at most {limit_overall:.0e}"


def moe_inputs(tokens, num_experts, top_k, hidden, ffn, dtype, device, mode="uniform", seed=0):
    """x, w_gate_up, w_down, expert_ids, weights and an upstream gradient; what no slot selects is NaN."""
    ids = route(tokens, num_experts, top_k, mode, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x, grad = normal(tokens, hidden), normal(tokens, hidden)
    w_gate_up = normal(num_experts, 2 * ffn, hidden, scale=hidden**-0.5)
    w_down = normal(num_experts, hidden, ffn, scale=ffn**-0.5)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    x[(ids < 0).all(1)] = float("nan")
    weights[ids < 0] = float("nan")
    unused = torch.tensor([not (ids == expert).any() for expert in range(num_experts)], dtype=torch.bool)
    w_gate_up[unused] = float("nan")
    w_down[unused] = float("nan")
    return tuple(tensor.to(device) for tensor in (x, w_gate_up, w_down, ids, weights, grad))


def gradients(function, leaves, grad):
    """The function's output at these leaves, and the gradient of each of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def run_moe(moe_mlp, x, w_gate_up, w_down, ids, weights, grad):
    """Output and the gradients of x, w_gate_up, w_down and weights."""
    return gradients(lambda x, gate_up, down, s: moe_mlp(x, gate_up, down, ids, s), (x, w_gate_up, w_down, weights), grad)


def in_double(*tensors):
    """The same values in fp64, NaN (never selected) replaced by zero, which the naive twin may multiply."""
    return [tensor.double().nan_to_num(0.0) if tensor.is_floating_point() else tensor for tensor in tensors]
