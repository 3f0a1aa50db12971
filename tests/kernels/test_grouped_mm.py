"""grouped_mm of every backend against the naive twin."""

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moe_cases import assert_close, dtypes, gradients, route, routings

from moe_kernels import KernelError, configs, launch
from moe_kernels.configs import Config
from moe_kernels.grouped_mm import reference, with_torch, with_triton
from moe_kernels.permutation import reference as permutation
from moe_kernels.permutation import with_triton as triton_permutation

BACKENDS = pytest.mark.parametrize("backend", [with_torch, with_triton], ids=["torch", "triton"])
SHAPES = [  # T, E, K, C, N, routing
    (0, 4, 2, 16, 8, "uniform"),
    (1, 8, 2, 64, 32, "uniform"),
    (63, 5, 2, 37, 11, "holes"),  # no stride is a multiple of 16 bytes
    (63, 5, 3, 72, 40, "zipf"),
    (130, 4, 1, 40, 72, "one"),
    (20, 6, 2, 40, 8, "none"),
    (7, 2, 1, 1280, 24, "uniform"),
    (7, 2, 1, 24, 1280, "uniform"),
]


def problem(shape, dtype, device):
    """rows (NaN where no expert owns them), w (NaN for unused experts), an upstream gradient, a plan and its live rows."""
    tokens, num_experts, top_k, inner, columns, mode = shape
    plan = permutation.sort_by_expert(route(tokens, num_experts, top_k, mode), num_experts)
    live = int(plan.offsets[-1])
    rows = torch.randn(tokens * top_k, inner, dtype=dtype)
    grad = torch.randn(tokens * top_k, columns, dtype=dtype)
    w = torch.randn(num_experts, columns, inner).mul(inner**-0.5).to(dtype)
    rows[live:], grad[live:] = float("nan"), float("nan")
    w[plan.offsets.diff() == 0] = float("nan")
    return *(tensor.to(device) for tensor in (rows, w, grad)), plan._replace(**{
        name: getattr(plan, name).to(device) for name in ("offsets", "row_slot", "slot_row")
    }), live  # fmt: skip


def check(backend, shape, dtype, device):
    rows, w, grad, plan, live = problem(shape, dtype, device)
    wide = [tensor.double().nan_to_num(0.0) for tensor in (rows, w, grad)]
    expected = gradients(lambda rows, w: reference.grouped_mm(rows, w, plan), wide[:2], wide[2])
    if backend is with_triton:
        plan = plan._replace(tiles=triton_permutation.map_tiles(plan.offsets, rows.shape[0], 64))
    actual = gradients(lambda rows, w: backend.grouped_mm(rows, w, plan), [rows, w], grad)
    assert_close(actual[0][:live], expected[0][:live], dtype, "out")
    assert_close(actual[1][:live], expected[1][:live], dtype, "grad rows")
    assert_close(actual[2], expected[2], dtype, "grad w")


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(backend, shape, device):
    for dtype in dtypes(device):
        check(backend, shape, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_in_other_dtypes(shape, dtype):
    check(with_torch, shape, dtype, "cpu")


@given(routings(), st.integers(1, 150), st.integers(1, 150), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=4, deadline=None, database=None, phases=[Phase.generate])
def test_any_shape_and_routing(routing, inner, columns, dtype):
    if not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    *sizes, mode = routing
    check(with_triton, (*sizes, inner, columns, mode), dtype, "cpu")


@pytest.mark.parametrize("product", ["down", "dxe"])
def test_rows_of_no_expert_stay_unwritten(product, device):
    rows, w, _, plan, live = problem((40, 4, 2, 24, 24, "holes"), torch.float32, device)
    out = with_triton.rows_product(product, rows, w, plan.offsets, transposed=product == "down")
    assert torch.isfinite(out[:live]).all()
    assert torch.isnan(out[live:]).all()


@pytest.mark.parametrize("variant", ["pointer", "tma"])
@pytest.mark.parametrize("gather", [False, True])
def test_the_last_rows_of_each_expert_in_the_weight_gradient(variant, gather, device):
    """Row counts around the block of 16, with an expert's last rows beside another's, and beside memory that nothing wrote."""
    if variant == "tma" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("TMA needs sm_90")
    counts = [15, 16, 17, 0, 1, 31]
    ids = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)] + [-1] * 20, dtype=torch.int32)
    ids = ids[torch.randperm(ids.shape[0], generator=torch.Generator().manual_seed(0))][:, None].contiguous()
    plan = permutation.sort_by_expert(ids, len(counts))
    live = sum(counts)
    a, b = torch.randn(100, 24, dtype=torch.float16), torch.randn(100, 40, dtype=torch.float16)
    a[live:] = float("nan")
    if not gather:
        b[live:] = float("nan")
    slots = plan.row_slot[:live].long()
    rows = b[slots] if gather else b[:live]
    expected = torch.zeros(len(counts), 24, 40, dtype=torch.float64)
    for expert, (start, end) in enumerate(itertools.pairwise(plan.offsets.tolist())):
        expected[expert] = a[start:end].double().T @ rows[start:end].double()
    with configs.override({"dw1": Config(32, 64, 16, 4, 2, variant)}):
        index = plan.offsets.to(device), plan.row_slot.to(device)
        actual = with_triton.rows_outer("dw1", a.to(device), b.to(device), *index, gather_b=int(gather))
    assert_close(actual, expected, torch.float16)


def test_a_tile_map_of_another_height_is_not_used(device):
    rows, w, _, plan, live = problem((40, 4, 2, 24, 24, "zipf"), torch.float32, device)
    expected = with_triton.rows_product("down", rows, w, plan.offsets, transposed=True)
    tiles = triton_permutation.map_tiles(plan.offsets, rows.shape[0], 16)
    with configs.override({"down": Config(32, 32, 32, 4, 2)}):
        actual = with_triton.rows_product("down", rows, w, plan.offsets, transposed=True, tiles=tiles)
    assert_close(actual[:live], expected[:live], torch.float32)


@BACKENDS
def test_compiles_with_changing_token_counts(backend, device):
    compiled = torch.compile(backend.grouped_mm, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (12, 20, 7):
        rows, w, grad, plan, _ = problem((tokens, 3, 2, 16, 8, "uniform"), torch.float32, device)
        expected = gradients(lambda rows, w, plan=plan: backend.grouped_mm(rows, w, plan), [rows, w], grad)
        actual = gradients(lambda rows, w, plan=plan: compiled(rows, w, plan), [rows, w], grad)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", [reference, with_torch, with_triton], ids=lambda b: b.__name__.rsplit(".")[-1])
def test_bad_arguments(backend):
    rows, w, _, plan, _ = problem((6, 3, 2, 16, 8, "uniform"), torch.float32, "cpu")
    for message, bad in {
        r"w must be \[E, N, C\] where rows is \[M, C\]": (rows, w.mT, plan),
        "w's first dim must be the plan's number of experts": (rows, w[:2], plan),
        "rows must have one row for each slot": (rows[:11], w, plan),
        "w must have rows's dtype and device": (rows, w.double(), plan),
        "w must be contiguous": (rows, torch.randn(3, 16, 8).mT, plan),
        "rows must be two-dimensional": (rows[None], w, plan),
    }.items():
        with pytest.raises(KernelError, match=message):
            backend.grouped_mm(*bad)
