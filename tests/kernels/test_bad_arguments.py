"""Every tensor argument of every public op with another device, dtype or memory order: refused by name, or read as it is."""

import pytest
import torch

from moe_kernels import Backend, KernelError, configs, get_backend, launch
from moe_kernels.types import Plan

T, E, K, D, F, P, V, H = 6, 3, 2, 16, 8, 8, 20, 2
BACKENDS = ["reference", "torch", pytest.param("triton", marks=pytest.mark.skipif(not launch.INTERPRETED, reason="on CPU"))]


def with_plan(call):
    """`call(plan, **tensors)` with the plan's index tensors as arguments by name."""

    def run(offsets, row_slot, slot_row, **tensors):
        return call(Plan(offsets, row_slot, slot_row), **tensors)

    return run


def calls(ops):
    """Op -> (function of its tensors by name, those tensors)."""
    normal = torch.randn
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [2, -1]], dtype=torch.int32)
    x, rows, weights = normal(T, D), normal(T * K, D), torch.rand(T, K)
    table, gate_up, down = normal(1, T, D // 4), normal(E, 2 * F, D), normal(E, D, F)
    plan = dict(zip(Plan._fields, ops.sort_by_expert(ids, E)[:3], strict=False))
    slots, target = {"weights": weights} | plan, torch.arange(T)
    cell = {"w_ih": normal(3 * P, P), "w_hh": normal(3 * P, P), "b_ih": normal(3 * P), "b_hh": normal(3 * P)}
    experts = {"x": x, "w_gate_up": gate_up, "w_down": down, "expert_ids": ids, "weights": weights}
    return {
        "sort_by_expert": (lambda expert_ids: ops.sort_by_expert(expert_ids, E).slot_row, {"expert_ids": ids}),
        "permute": (with_plan(lambda plan, x: ops.permute(x, plan)[:-1]), {"x": x} | plan),
        "unpermute": (with_plan(lambda plan, rows, weights: ops.unpermute(rows, plan, weights)), {"rows": rows} | slots),
        "grouped_mm": (with_plan(lambda plan, rows, w: ops.grouped_mm(rows, w, plan)[:-1]), {"rows": rows, "w": gate_up} | plan),
        "moe_mlp": (ops.moe_mlp, experts),
        "score_topk": (lambda hidden, weight: ops.score_topk(hidden, weight, K).weights, {"hidden": x, "weight": normal(E, D)}),
        "gru_step": (ops.gru_step, {"z": normal(T, P), "h": normal(T, P)} | cell),
        "rms_norm": (lambda x, weight: ops.rms_norm(x, weight, 1e-6), {"x": x, "weight": normal(D)}),
        "add_rms_norm": (
            lambda x, branch, weight: ops.add_rms_norm(x, branch, weight, 1e-6)[1],
            {"x": x, "branch": normal(T, D), "weight": normal(D)},
        ),
        "rope": (ops.rope, {"x": normal(2, T, H, D // 2), "cos": table, "sin": table.square()}),
        "swiglu": (lambda gate_up: ops.swiglu(gate_up), {"gate_up": x}),
        "linear_cross_entropy": (
            lambda x, w, target, coef: ops.linear_cross_entropy(x, w, target, coef)[1],
            {"x": x, "w": normal(V, D), "target": target, "coef": torch.rand(T)},
        ),
    }  # fmt: skip


ARGUMENTS = [(op, name) for op, (_, tensors) in calls(get_backend("reference")).items() for name in tensors]
REFUSED_STRIDED = {("sort_by_expert", "expert_ids")} | {
    (op, name) for op, name in ARGUMENTS if op in ("permute", "unpermute", "grouped_mm", "moe_mlp")
}
IN_A_PLAN = ("offsets", "row_slot", "slot_row")


def shown(name):
    return f"plan.{name}" if name in IN_A_PLAN else name


def strided(tensor):
    """The same values with a gap after each one, which holds what must not be read."""
    poison = float("nan") if tensor.is_floating_point() else -777_777
    return torch.stack([tensor, torch.full_like(tensor, poison)], -1)[..., 0]


def test_every_op_is_here():
    assert {op for op, _ in ARGUMENTS} == {*Backend._fields} - {"name"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_another_device_or_dtype_is_refused_by_name(op, name, backend):
    call, tensors = calls(get_backend(backend))[op]
    wrong = [tensors[name].bool()] if tensors[name].is_floating_point() else [tensors[name].short(), tensors[name].float()]
    if len(tensors) > 1:
        wrong.append(tensors[name].to("meta"))
    for bad in wrong:
        with pytest.raises(KernelError, match=rf"^{op}: .*\b{shown(name)}=\[[\d, ]+\] {str(bad.dtype)[6:]} {bad.device}"):
            call(**tensors | {name: bad})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_another_memory_order_is_refused_or_read_right(op, name, backend):
    call, tensors = calls(get_backend(backend))[op]
    bad = tensors | {name: strided(tensors[name])}
    if (op, name) in REFUSED_STRIDED:
        with pytest.raises(KernelError, match=rf"^{op}: {shown(name)} must be contiguous"):
            call(**bad)
    else:
        torch.testing.assert_close(call(**bad), call(**tensors))


def test_a_plan_of_other_slots():
    ops = get_backend("torch")
    plan = ops.sort_by_expert(torch.zeros(T, K, dtype=torch.int32), E)
    with pytest.raises(
        KernelError, match=r"permute: plan.row_slot must be \[T \* K\].* plan.row_slot=\[11\] .*slot_row=\[6, 2\]"
    ):
        ops.permute(torch.randn(T, D), plan._replace(row_slot=plan.row_slot[:11]))


@pytest.mark.skipif(not launch.INTERPRETED, reason="a machine with a GPU runs them there")
@pytest.mark.parametrize("op", dict.fromkeys(op for op, _ in ARGUMENTS))
def test_triton_refuses_fp64_and_without_its_interpreter_what_is_on_the_cpu(op, monkeypatch):
    call, tensors = calls(get_backend("triton"))[op]
    if op != "sort_by_expert":
        with pytest.raises(KernelError, match=rf"^{op}: float64 is not supported by triton kernels, got \[6|\[12|\[2"):
            call(**{name: value.double() if value.is_floating_point() else value for name, value in tensors.items()})
    monkeypatch.setattr(configs, "_INTERPRETED", False)
    with pytest.raises(KernelError, match=rf"^{op}: triton kernels need CUDA tensors, got \[.*\] on cpu"):
        call(**tensors)
