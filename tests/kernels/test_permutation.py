"""sort_by_expert, permute and unpermute of every backend against the naive twin."""

import runpy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moe_cases import ROUTINGS, assert_close, dtypes, gradients, route, routings

from moe_kernels import KernelError, checks, launch
from moe_kernels.checks import debug_checks
from moe_kernels.grouped_mm import with_torch as grouped_mm_torch
from moe_kernels.grouped_mm import with_triton as grouped_mm_triton
from moe_kernels.permutation import reference, with_torch, with_triton
from moe_kernels.types import Plan

FAST = [with_torch, with_triton]
SHAPES = [(0, 4, 2), (1, 1, 1), (2, 5, 5), (63, 5, 2), (257, 16, 4), (40, 70, 3), (300, 2, 1)]  # T, E, K


def same_plan(plan, ids, num_experts):
    """The plan equals the naive one wherever it means something."""
    expected = reference.sort_by_expert(ids.cpu(), num_experts)
    live = int(expected.offsets[-1])
    assert torch.equal(plan.offsets.cpu(), expected.offsets)
    assert torch.equal(plan.slot_row.cpu(), expected.slot_row)
    assert torch.equal(plan.row_slot[:live].cpu(), expected.row_slot[:live])
    return live


@pytest.mark.parametrize("backend", FAST, ids=lambda b: b.__name__.rsplit("_")[-1])
@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("mode", ROUTINGS)
def test_sort_equals_the_naive_stable_sort(backend, tokens, num_experts, top_k, mode, device):
    ids = route(tokens, num_experts, top_k, mode).to(device)
    plan = backend.sort_by_expert(ids, num_experts)
    same_plan(plan, ids, num_experts)
    assert plan.num_experts == num_experts
    assert plan.top_k == top_k


def test_more_blocks_of_slots_than_one_step_of_the_prefix(device, monkeypatch):
    """Small blocks in the place of 131,073 slots."""
    monkeypatch.setattr(with_triton, "_SORT", replace(with_triton._SORT, block_m=16, block_k=16))
    ids = route(190, 5, 3, "holes").to(device)
    same_plan(with_triton.sort_by_expert(ids, 5), ids, 5)


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("block_rows", [16, 64])
def test_tile_map_covers_each_experts_rows_in_order(tokens, num_experts, top_k, block_rows, device):
    ids = route(tokens, num_experts, top_k, "holes").to(device)
    offsets, row_slot, _, sorted_map = with_triton.sort_slots(ids, num_experts, block_rows)
    bounds = offsets.tolist()
    expected = [(expert, row) for expert in range(num_experts) for row in range(bounds[expert], bounds[expert + 1], block_rows)]
    for tiles in (sorted_map, with_triton.map_tiles(offsets, row_slot.shape[0], block_rows)):
        assert int(tiles.live) == len(expected)
        assert list(zip(tiles.expert.tolist(), tiles.row.tolist(), strict=True))[: len(expected)] == expected
        assert (tiles.expert[len(expected) :] == -1).all()


@given(st.data())
@settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate])
def test_sort_of_any_ids(data):
    if not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    num_experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, 4))
    flat = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=300))
    ids = torch.tensor(flat[: len(flat) // top_k * top_k], dtype=torch.int32).view(-1, top_k)
    for backend in FAST:
        same_plan(backend.sort_by_expert(ids, num_experts), ids, num_experts)


def check(backend, sizes, mode, weighted, dtype, device):
    """permute and unpermute, with gradients; NaN in rows that no expert owns, in tokens and weights that no slot selects."""
    tokens, num_experts, top_k, width = sizes
    ids = route(tokens, num_experts, top_k, mode).to(device)
    plan = backend.sort_by_expert(ids, num_experts)
    live = same_plan(plan, ids, num_experts)
    truth = Plan(*(index.cpu() for index in reference.sort_by_expert(ids, num_experts)[:3]))
    x, grad_rows = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens * top_k, width, dtype=dtype)
    rows, grad = torch.randn(tokens * top_k, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
    rows[live:], grad_rows[live:] = float("nan"), float("nan")
    x[(ids.cpu() < 0).all(1)] = float("nan")
    weights = torch.rand(tokens, top_k)
    weights[ids.cpu() < 0] = float("nan")
    wide = [tensor.double().nan_to_num(0.0) for tensor in (x, grad_rows, rows, grad, weights)]

    out, grad_x = gradients(lambda x: backend.permute(x, plan), [x.to(device)], grad_rows.to(device))
    expected, expected_grad = gradients(lambda x: reference.permute(x, truth), [wide[0]], wide[1])
    assert torch.equal(out[:live].double().cpu(), expected[:live])
    assert_close(grad_x, expected_grad, dtype, "grad x")

    leaves = [rows.to(device), weights.to(device)] if weighted else [rows.to(device)]
    actual = gradients(lambda r, w=None: backend.unpermute(r, plan, w), leaves, grad.to(device))
    expected = gradients(lambda r, w=None: reference.unpermute(r, truth, w), [wide[2], wide[4]][: len(leaves)], wide[3])
    assert_close(actual[0], expected[0], dtype, "out")
    assert_close(actual[1][:live], expected[1][:live], dtype, "grad rows")
    if weighted:
        assert_close(actual[2], expected[2], dtype, "grad weights")


@pytest.mark.parametrize("backend", FAST, ids=lambda b: b.__name__.rsplit("_")[-1])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width", "mode"),
    [
        (0, 4, 2, 8, "uniform"),
        (1, 8, 2, 40, "uniform"),
        (63, 5, 3, 72, "holes"),
        (63, 5, 2, 8, "none"),
        (70, 4, 4, 136, "one"),
        (9, 3, 2, 1280, "holes"),
    ],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_permute_and_unpermute(backend, tokens, num_experts, top_k, width, mode, weighted, device):
    for dtype in dtypes(device):
        check(backend, (tokens, num_experts, top_k, width), mode, weighted, dtype, device)


@given(routings(), st.integers(1, 600), st.booleans(), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=4, deadline=None, database=None, phases=[Phase.generate])
def test_any_shape_and_routing(routing, width, weighted, dtype):
    if not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    *sizes, mode = routing
    check(with_triton, (*sizes, width), mode, weighted, dtype, torch.device("cpu"))


@pytest.mark.parametrize("backend", FAST, ids=lambda b: b.__name__.rsplit("_")[-1])
def test_a_permuted_layer_compiles_with_changing_token_counts(backend, device):
    grouped_mm = {with_torch: grouped_mm_torch, with_triton: grouped_mm_triton}[backend].grouped_mm

    def layer(x, w, weights, ids):
        plan = backend.sort_by_expert(ids, 4)
        return backend.unpermute(grouped_mm(backend.permute(x, plan), w, plan), plan, weights)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (12, 20, 31):
        ids = route(tokens, 4, 2, "holes").to(device)
        leaves = [
            torch.randn(tokens, 16, device=device),
            torch.randn(4, 16, 16, device=device),
            torch.rand(tokens, 2, device=device),
        ]
        grad = torch.randn(tokens, 16, device=device)
        actual = gradients(lambda *leaves, ids=ids: compiled(*leaves, ids), leaves, grad)
        expected = gradients(lambda *leaves, ids=ids: layer(*leaves, ids), leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_permute_leaves_rows_of_empty_slots_alone(device):
    ids = route(40, 4, 2, "holes").to(device)
    plan = with_triton.sort_by_expert(ids, 4)
    live = int(plan.offsets[-1])
    rows = with_triton.permute(torch.randn(40, 24, device=device), plan)
    assert live < rows.shape[0]
    assert torch.isnan(rows[live:]).all()


def test_the_sum_over_k_has_one_order():
    """(1 + 1e8) - 1e8 is 0 in fp32, and 1 in the reverse order."""
    ids = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    for backend in (reference, *FAST):
        if backend is with_triton and not launch.INTERPRETED:
            continue
        plan = backend.sort_by_expert(ids, 3)
        rows = torch.empty(3, 8)
        rows[plan.slot_row[0].long()] = torch.tensor([1.0, 1e8, -1e8])[:, None].expand(3, 8)
        assert torch.equal(backend.unpermute(rows, plan, torch.ones(1, 3)), torch.zeros(1, 8))


@pytest.mark.parametrize("backend", [reference, *FAST], ids=lambda b: b.__name__.rsplit(".")[-1])
def test_bad_arguments(backend):
    ids = route(6, 4, 2)
    plan = backend.sort_by_expert(ids, 4)
    x = torch.randn(6, 8)
    rows = torch.randn(12, 8)
    for message, call in {
        r"expert_ids must be \[T, K\] int32": lambda: backend.sort_by_expert(ids.long(), 4),
        "num_experts must be at least 1": lambda: backend.sort_by_expert(ids, 0),
        "expert_ids must be contiguous": lambda: backend.sort_by_expert(ids.T, 4),
        r"T \* K must be at most 2\^30.* got expert_ids=\[268435457, 4\] int32": lambda: backend.sort_by_expert(
            torch.empty(2**28 + 1, 4, dtype=torch.int32, device="meta"), 4
        ),
        "one row for each token": lambda: backend.permute(x[:5], plan),
        "x must be contiguous": lambda: backend.permute(torch.randn(8, 6).T, plan),
        "x must be float16": lambda: backend.permute(x.int(), plan),
        "plan.offsets must be int32": lambda: backend.permute(x, plan._replace(offsets=plan.offsets.long())),
        "rows must have one row for each slot": lambda: backend.unpermute(rows[:11], plan, None),
        r"weights must be \[T, K\]": lambda: backend.unpermute(rows, plan, torch.rand(6, 3)),
    }.items():
        with pytest.raises(KernelError, match=message):
            call()


def test_debug_mode_from_the_environment(monkeypatch):
    wrong = torch.full((2, 1), 7, dtype=torch.int32)
    for value in ("0", "1"):
        monkeypatch.setenv("MOE_KERNELS_DEBUG", value)
        check_expert_ids = runpy.run_path(checks.__file__)["check_expert_ids"]
        with pytest.raises(KernelError, match=r"expert_ids\[0, 0\] = 7") if value == "1" else nullcontext():
            check_expert_ids("op", wrong, 4)


def test_ids_out_of_range_are_found_in_debug_mode_only():
    ids = route(6, 4, 2)
    ids[3, 1] = 4
    for backend in (reference, *FAST):
        with debug_checks(), pytest.raises(KernelError, match=r"expert_ids\[3, 1\] = 4 is outside of \[-1, 4\)"):
            backend.sort_by_expert(ids, 4)
        if backend is not with_triton or launch.INTERPRETED:
            plan = backend.sort_by_expert(ids, 4)  # without debug mode the slot counts as empty: no memory is at risk
            assert int(plan.slot_row[3, 1]) == -1
            assert int(plan.offsets[-1]) == 11
