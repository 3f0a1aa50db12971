"""What only a GPU can show about moe_mlp: bf16, the flagship shape, CUDA graphs and offsets above 2^31."""

import pytest
import torch
from moe_cases import assert_close, in_double, moe_inputs, run_moe

from moe_kernels import configs, launch
from moe_kernels.moe_mlp import reference, with_torch, with_triton

pytestmark = pytest.mark.gpu
NAMES = ("out", "grad x", "grad w_gate_up", "grad w_down", "grad weights")


@pytest.fixture(autouse=True)
def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [257, 4096])
@pytest.mark.parametrize("mode", ["uniform", "zipf", "holes"])
def test_flagship_shape_in_bf16(tokens, mode):
    """Within the tolerance of bf16, at most 1.5 times as far from fp64 as torch's path, and the same bits in a second run."""
    inputs = moe_inputs(tokens, 16, 4, 1280, 448, torch.bfloat16, "cuda", mode)
    expected = run_moe(reference.moe_mlp, *in_double(*inputs))
    unfused = run_moe(with_torch.moe_mlp, *inputs)
    actual, again = run_moe(with_triton.moe_mlp, *inputs), run_moe(with_triton.moe_mlp, *inputs)
    for name, a, b, torchs, truth in zip(NAMES, actual, again, unfused, expected, strict=True):
        assert_close(a, truth, torch.bfloat16, name)
        assert torch.equal(a, b), f"{name} differs between runs"
        assert error(a, truth) <= 1.5 * error(torchs, truth) + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("op", ["up", "down", "da", "dxe", "dw1", "dw2", "combine"])
def test_every_candidate_in_bf16(op):
    """Each config that the tuner may choose gives right numbers, on ragged experts; those of other architectures are left out."""
    arch = max(a for a in configs.CANDIDATES if a <= 10 * torch.cuda.get_device_capability()[0])
    inputs = moe_inputs(700, 5, 2, 256, 448, torch.bfloat16, "cuda", "zipf")
    expected = run_moe(reference.moe_mlp, *in_double(*inputs))
    for config in configs.CANDIDATES[arch][op]:
        with configs.override({op: config}):
            for name, a, truth in zip(NAMES, run_moe(with_triton.moe_mlp, *inputs), expected, strict=True):
                assert_close(a, truth, torch.bfloat16, f"{name} with {op} {config}")


def test_tf32_is_close_and_only_on_request():
    inputs = moe_inputs(300, 4, 2, 128, 64, torch.float32, "cuda")
    exact = run_moe(with_triton.moe_mlp, *inputs)
    with configs.allow_tf32():
        rounded = run_moe(with_triton.moe_mlp, *inputs)
    for name, a, b in zip(NAMES, rounded, exact, strict=True):
        assert 0 < error(a, b.double()) < 3e-3, name


def test_a_graph_replays_with_any_routing(monkeypatch):
    """Grids depend on shapes only, so a graph captured with one routing gives another routing's exact result."""
    monkeypatch.setattr(launch, "_allocate", torch.empty)
    captured, other = (moe_inputs(512, 8, 2, 256, 128, torch.bfloat16, "cuda", mode) for mode in ("uniform", "duplicates"))
    x, gate_up, down, ids, weights, grad = (tensor.clone() for tensor in captured)
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, weights)]

    def step():
        out = with_triton.moe_mlp(x, gate_up, down, ids, weights)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for inputs in (other, captured):
        with torch.no_grad():
            for static, value in zip((x, gate_up, down, ids, weights, grad), inputs, strict=True):
                static.copy_(value)
        graph.replay()
        for name, a, b in zip(NAMES, results, run_moe(with_triton.moe_mlp, *inputs), strict=True):
            assert torch.equal(a.detach(), b), name


def test_offsets_above_2_to_the_31(monkeypatch):
    """M * D, M * F and E * 2F * D exceed 2^31; the last tokens, and their gradients, must equal those of the same tokens alone."""
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs 100 GB")
    monkeypatch.setattr(launch, "_allocate", torch.empty)
    tokens, num_experts, top_k, hidden, ffn = 2**18, 64, 4, 4096, 4160
    assert min(tokens * top_k * hidden, num_experts * 2 * ffn * hidden) > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)  # noqa: E731
    x, gate_up, down = normal(tokens, hidden), normal(num_experts, 2 * ffn, hidden), normal(num_experts, hidden, ffn)
    gate_up *= hidden**-0.5
    down *= ffn**-0.5
    ids = torch.randint(0, num_experts, (tokens, top_k), device="cuda", generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, device="cuda", generator=generator)
    ids[-64:] = torch.arange(num_experts - top_k, num_experts, device="cuda", dtype=torch.int32)

    def of_the_last(start):
        leaves = [value[start:].detach().requires_grad_() for value in (x, weights)]
        out = with_triton.moe_mlp(leaves[0], gate_up, down, ids[start:], leaves[1])
        return [value[-64:].clone() for value in (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))]

    with configs.batch_invariant():
        last, alone = of_the_last(0), of_the_last(tokens - 64)
    for name, a, b in zip(("out", "grad x", "grad weights"), last, alone, strict=True):
        assert torch.equal(a, b), name
    expected = reference.moe_mlp(*(tensor.float() for tensor in (x[-64:],)), gate_up[-4:].float(), down[-4:].float(),
                                 ids[-64:] - (num_experts - top_k), weights[-64:])  # fmt: skip
    assert_close(last[0], expected, torch.bfloat16)
