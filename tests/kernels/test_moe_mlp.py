"""moe_mlp of every backend against the naive twin: outputs and all gradients, on poisoned memory."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moe_cases import assert_close, dtypes, in_double, moe_inputs, routings, run_moe
from torch.autograd import gradcheck

from moe_kernels import KernelError, configs, launch
from moe_kernels.checks import debug_checks
from moe_kernels.configs import Config
from moe_kernels.moe_mlp import reference, with_torch, with_triton
from moe_kernels.permutation.with_triton import map_tiles, sort_slots

SHAPES = [  # T, E, K, D, F, routing
    (0, 4, 2, 16, 8, "uniform"),
    (1, 8, 2, 64, 32, "uniform"),
    (2, 5, 5, 8, 8, "uniform"),
    (9, 1, 1, 32, 16, "uniform"),
    (63, 5, 2, 72, 40, "zipf"),
    (63, 5, 3, 37, 11, "holes"),
    (70, 4, 2, 72, 40, "duplicates"),
    (130, 4, 1, 64, 40, "one"),
    (20, 6, 2, 40, 8, "none"),
    (7, 2, 1, 1280, 24, "uniform"),
    (7, 2, 1, 24, 1280, "uniform"),
    pytest.param((7, 3, 2, 1280, 448, "uniform"), marks=pytest.mark.slow),  # the flagship's matrices
]
NAMES = ("out", "grad x", "grad w_gate_up", "grad w_down", "grad weights")


def check(backend, inputs, dtype):
    """Output and gradients against the fp64 twin; where no slot selects, all of them are exactly zero."""
    expected = run_moe(reference.moe_mlp, *in_double(*inputs))
    actual = run_moe(backend.moe_mlp, *inputs)
    ids, weights = inputs[3], inputs[4]
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert_close(a, b, dtype, name)
    assert actual[4].dtype == weights.dtype
    assert not actual[4][ids < 0].any(), "an empty slot has a routing gradient"
    assert not actual[0][(ids < 0).all(1)].any(), "a token without experts has an output"


@pytest.mark.parametrize("backend", [with_torch, with_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(backend, shape, device):
    *sizes, mode = shape
    for dtype in dtypes(device):
        check(backend, moe_inputs(*sizes, dtype, device, mode), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_in_other_dtypes(shape, dtype):
    *sizes, mode = shape
    check(with_torch, moe_inputs(*sizes, dtype, "cpu", mode), dtype)


@pytest.mark.parametrize("variant", ["pointer", "wide", "tma"])
def test_every_variant_on_several_tiles(variant, device):
    """Column tiles that F does not fill, K steps that D does not fill, experts of several row tiles, of one row and of none.

    A persistent grid must give the same bits as a plain one.
    """
    if variant == "tma" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("TMA needs sm_90")
    inputs = moe_inputs(30, 5, 2, 40, 24, torch.float16, device, "holes")
    rows = "pointer" if variant == "wide" else variant

    def run(persistent):
        product = Config(32, 32, 32, 4, 2, rows, persistent)
        tiles = {"up": Config(32, 16, 32, 4, 2, variant, persistent), "down": product, "dxe": product}
        tiles |= {
            "da": Config(16, 16, 32, 4, 2, rows, persistent),
            "dw1": Config(64, 32, 16, 4, 2),
            "dw2": Config(32, 32, 32, 4, 2),
        }
        with configs.override(tiles):
            return run_moe(with_triton.moe_mlp, *inputs)

    expected = run_moe(reference.moe_mlp, *in_double(*inputs))
    for name, truth, plain, persistent in zip(NAMES, expected, run(False), run(True), strict=True):
        assert_close(plain, truth, torch.float16, name)
        assert torch.equal(plain, persistent), name


@given(routings(), st.integers(1, 80), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=6, deadline=None, database=None, phases=[Phase.generate])
def test_any_shape_and_routing(routing, hidden, ffn, seed):
    if not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    *sizes, mode = routing
    for backend in (with_torch, with_triton):
        check(backend, moe_inputs(*sizes, hidden, ffn, torch.float32, "cpu", mode, seed), torch.float32)


def test_the_naive_twin_against_loops_and_finite_differences():
    x, gate_up, down, ids, weights, _ = in_double(*moe_inputs(5, 3, 2, 4, 3, torch.float64, "cpu", "holes"))
    ids[0] = torch.tensor([1, 1])
    out = torch.zeros_like(x)
    for t, k in itertools.product(range(5), range(2)):
        if ids[t, k] >= 0:
            z = gate_up[ids[t, k]] @ x[t]
            out[t] += weights[t, k] * (down[ids[t, k]] @ (z[:3] * torch.sigmoid(z[:3]) * z[3:]))
    assert_close(reference.moe_mlp(x, gate_up, down, ids, weights), out, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, weights)]
    assert gradcheck(lambda x, g, d, s: reference.moe_mlp(x, g, d, ids, s), leaves)


def test_rows_of_no_expert_stay_unwritten(device):
    x, gate_up, down, ids, weights, grad = moe_inputs(40, 5, 2, 24, 16, torch.float32, device, "holes")
    config = configs.pick("up", x, gate_up)
    offsets, row_slot, _slot_row, tiles = sort_slots(ids, 5, config.block_m)
    live = int(offsets[-1])
    z, y = with_triton.up_swiglu(x, gate_up, offsets, row_slot, 2, config, tiles)
    da = configs.pick("da", x, down)
    tiles = map_tiles(offsets, row_slot.shape[0], da.block_m)
    dz, ya, partial = with_triton.down_gradient(grad, down, weights, z, offsets, row_slot, da, tiles)
    assert 0 < live < row_slot.shape[0]
    for rows in (z, y, dz, ya, partial.T):
        assert torch.isfinite(rows[:live]).all()
        assert torch.isnan(rows[live:]).all()


def test_the_activation_is_a_function_of_the_rounded_pre_activation(device):
    """Backward recomputes y from the stored z, so forward must not have used more precise values than it stored."""
    x, gate_up, _, ids, *_ = moe_inputs(60, 3, 2, 64, 32, torch.float16, device)
    config = configs.pick("up", x, gate_up)
    offsets, row_slot, _, tiles = sort_slots(ids, 3, config.block_m)
    z, y = with_triton.up_swiglu(x, gate_up, offsets, row_slot, 2, config, tiles)
    gate, up = z.double().chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(gate) * up).half()
    assert (y == expected).float().mean() > 0.99


def saved_bytes(backend, x, gate_up, down, ids, weights, _):
    """Bytes that autograd keeps for backward, without the experts' weights, which are there anyway."""
    leaves = [leaf.requires_grad_() for leaf in (x, gate_up, down, weights)]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backend.moe_mlp(*leaves[:3], ids, weights)
    return sum(saved.values()) - gate_up.nbytes - down.nbytes


@pytest.mark.parametrize("backend", [with_torch, with_triton], ids=["torch", "triton"])
@pytest.mark.parametrize(("num_experts", "top_k", "hidden", "ffn"), [(4, 2, 32, 24), (4, 4, 1280, 448)])
def test_saved_for_backward_is_x_z_indices_and_routing_weights(backend, num_experts, top_k, hidden, ffn, device):
    """At most 10 KB for a token of the flagship's shape."""
    tokens = 64
    saved = saved_bytes(backend, *moe_inputs(tokens, num_experts, top_k, hidden, ffn, torch.float16, device))
    per_token = (saved - 4 * (num_experts + 1)) / tokens
    assert per_token == 2 * hidden + top_k * (4 * ffn + 2 * 4 + 4)
    assert hidden != 1280 or per_token <= 10_000


@pytest.mark.parametrize("backend", [with_torch, with_triton], ids=["torch", "triton"])
def test_compiles_with_changing_token_counts(backend, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(backend.moe_mlp, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (12, 20, 7):
        inputs = moe_inputs(tokens, 3, 2, 16, 8, torch.float32, device)
        for a, b in zip(run_moe(compiled, *inputs), run_moe(backend.moe_mlp, *inputs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", [with_torch, with_triton], ids=["torch", "triton"])
def test_two_runs_are_bitwise_equal(backend, device):
    inputs = moe_inputs(100, 5, 2, 40, 24, torch.float32, device, "zipf")
    for a, b in zip(run_moe(backend.moe_mlp, *inputs), run_moe(backend.moe_mlp, *inputs), strict=True):
        assert torch.equal(a, b)


def test_a_token_does_not_depend_on_the_others(device):
    """With the configs pinned, a token's output has the same bits alone and in a batch."""
    x, gate_up, down, ids, weights, _ = moe_inputs(40, 5, 2, 40, 24, torch.float16, device)
    with configs.batch_invariant():
        together = with_triton.moe_mlp(x, gate_up, down, ids, weights)
        alone = with_triton.moe_mlp(x[7:8], gate_up, down, ids[7:8], weights[7:8])
    assert torch.equal(together[7:8], alone)


@pytest.mark.parametrize("backend", [reference, with_torch, with_triton], ids=lambda b: b.__name__.rsplit(".")[-1])
def test_bad_arguments(backend):
    x, gate_up, down, ids, weights, _ = moe_inputs(6, 3, 2, 16, 8, torch.float32, "cpu")
    good = {"x": x, "w_gate_up": gate_up, "w_down": down, "expert_ids": ids, "weights": weights}
    for message, bad in {
        r"w_down must be \[E, D, F\] where x is \[T, D\] *; got w_down=\[3, 8, 16\]": {"w_down": down.mT},
        r"w_gate_up must be \[E, 2F, D\].* w_gate_up=\[2, 16, 16\]": {"w_gate_up": gate_up[:2]},
        "w_gate_up must be contiguous": {"w_gate_up": torch.randn(3, 16, 16).mT},
        "x must be contiguous": {"x": torch.randn(16, 6).T},
        "w_down must have x's dtype and device": {"w_down": down.half()},
        "expert_ids must be .* int32": {"expert_ids": ids.long()},
        "expert_ids must have one row for each token": {"expert_ids": ids[:5], "weights": weights[:5]},
        "weights must be": {"weights": weights[:, :1]},
        "x must be two-dimensional": {"x": x[None]},
    }.items():
        with pytest.raises(KernelError, match=message):
            backend.moe_mlp(**(good | bad))
    wrong = ids.clone()
    wrong[2, 0] = -2
    with debug_checks(), pytest.raises(KernelError, match=r"expert_ids\[2, 0\] = -2"):
        backend.moe_mlp(x, gate_up, down, wrong, weights)
