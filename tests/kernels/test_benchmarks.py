"""The benchmark harness on a CPU: its counts, its checks, its rows, and what it does with a wrong, absent or broken provider."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))  # scripts, not a package

import harness
import layer_ops
import machine
import moe_ops
import op_jobs
import report
import rivals
import run
import tune
from harness import FORWARD, TRAINING, Budget, DeviceLost, Job, Problem, Provider, Runner, Session, Settings

from moe_kernels import configs, launch

CPU = torch.device("cpu")
TINY = moe_ops.Shape("tiny", 24, 4, 2, 16, 8)
FAST = Settings(repeats=3, seconds=0.0)


def scaled(factor=1.0, *, fail=None, sleep=0.0):
    """A provider of y = 3 x that returns `factor` times that, raises `fail` or takes its time."""

    def prepare(problem):
        x = problem.inputs["x"].clone().requires_grad_()

        def forward():
            time.sleep(sleep)
            if fail is not None:
                raise fail
            return (3 * factor * x,)

        name_results = lambda outputs, grads: {"out": outputs[0], "dx": grads[0]}  # noqa: E731
        return Runner(forward, (x,), (torch.ones_like(x),), name_results)

    return prepare


def provider(name, prepare, reason=None):
    return Provider(name, lambda: "1.0", lambda: reason, prepare)


def triple():
    x = torch.arange(1.0, 5.0)
    expected = {"out": 3 * x, "dx": torch.full((4,), 3.0)}
    return Problem("triple", "four", {"T": 4}, None, torch.float32, {"x": x}, expected, flops={FORWARD: 4.0, TRAINING: 8.0})


def measure(*providers, settings=FAST, build=triple, path=None, budget=None):
    writer = report.Writer(path, {"gpu": "none"})
    with machine.Monitor(CPU) as monitor:
        session = Session(CPU, writer, monitor, settings, Budget(budget))
        session.run([Job("triple", "triple four", build, providers)])
    return session


def statuses(session):
    return {row["provider"]: row["status"] for row in session.writer.rows}


def test_rows_hold_what_was_measured(tmp_path):
    session = measure(provider("triton", scaled()), path=tmp_path / "new" / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert rows == session.writer.rows
    assert [row["pass"] for row in rows] == [FORWARD, TRAINING]
    for row in rows:
        assert row["status"] == "ok"
        assert (row["op"], row["shape"], row["T"], row["dtype"], row["gpu"]) == ("triple", "four", 4, "float32", "none")
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["repeats"] == 3
        assert row["tflops"] == pytest.approx({FORWARD: 4, TRAINING: 8}[row["pass"]] / row["p50_ms"] / 1e9, rel=1e-3)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / row["matmul_ceiling_tflops"], rel=1e-3)
        assert row["errors"] == {"out": 0, "dx": 0}
        assert row["deterministic"]


def test_a_wrong_provider_is_listed_and_not_timed():
    session = measure(provider("good", scaled()), provider("off", scaled(1.01)), provider("nan", scaled(float("nan"))))
    assert statuses(session) == {"good": "ok", "off": "wrong", "nan": "wrong"}
    reasons = {row["provider"]: row["reason"] for row in session.writer.rows if row["status"] == "wrong"}
    assert reasons["off"].startswith("err=1.0e-02 (out)")
    assert "nan" in reasons["nan"]
    assert all("p50_ms" not in row for row in session.writer.rows if row["status"] == "wrong")
    assert "wrong: err=1.0e-02" in report.table(session.writer.rows)


def test_a_failure_ends_neither_the_run_nor_the_others():
    session = measure(
        provider("broken", scaled(fail=torch.OutOfMemoryError("no room\nmore text"))),
        provider("absent", scaled(), reason="ModuleNotFoundError: No module named 'absent'"),
        provider("good", scaled()),
    )
    assert statuses(session) == {"absent": "unavailable", "broken": "failed", "good": "ok"}
    reasons = {row["provider"]: row.get("reason") for row in session.writer.rows}
    assert reasons["broken"] == "OutOfMemoryError: no room"
    assert reasons["absent"] == "ModuleNotFoundError: No module named 'absent'"


def test_a_problem_that_cannot_be_built_is_a_row():
    def build():
        raise torch.OutOfMemoryError("too large")

    (row,) = measure(provider("good", scaled()), build=build).writer.rows
    assert (row["status"], row["shape"], row["reason"]) == ("failed", "triple four", "OutOfMemoryError: too large")


def test_a_failure_while_timing_is_a_row():
    calls = iter(range(1000))

    def sometimes():
        if next(calls) > 4:
            raise RuntimeError("late")

    results = harness.time_in_turns({"late": sometimes, "good": lambda: None}, FAST, CPU, torch.empty(0))
    assert results["late"] == "RuntimeError: late"
    assert results["good"].repeats == 3


def test_first_calls_that_take_too_long_are_given_up():
    settings = FAST._replace(setup_limit=0.2)
    session = measure(provider("slow", scaled(sleep=5.0)), provider("good", scaled()), settings=settings)
    assert statuses(session) == {"slow": "failed", "good": "ok"}
    assert "0 s" in session.writer.rows[0]["reason"]


def test_a_spent_budget_leaves_out_and_says_so():
    session = measure(provider("good", scaled()), budget=0.0)
    assert not session.writer.rows
    assert session.left_out == ["triple four: good"]
    assert not Budget(None).spent()


def test_a_lost_device_ends_in_a_new_process_without_the_culprit(monkeypatch):
    def no_answer(_):
        raise RuntimeError("CUDA error")

    with machine.Monitor(CPU) as monitor:
        session = Session(CPU, report.Writer(None, {}), monitor, FAST)
        monkeypatch.setattr(harness, "_free", no_answer)
        bad = provider("liger", scaled(fail=RuntimeError("illegal address")))
        with pytest.raises(DeviceLost) as caught:
            session.run([Job("triple", "triple four", triple, [bad])])
    assert statuses(session) == {"liger": "failed"}

    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    options = run.parse(["--rivals", "liger,scattermoe", "--budget", "100"])
    run.restart(caught.value, options, Budget(50))
    again = run.parse(started[0][-6:])  # of options given twice the later one holds
    assert (again.rivals, again.start_at) == ("scattermoe", 0)
    assert again.budget <= 50
    run.restart(DeviceLost("triton", "illegal address"), options, Budget(50))
    again = run.parse(started[1][-6:])
    assert (again.rivals, again.start_at) == ("scattermoe,liger", 1)


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert harness.relative_error(expected, expected) == 0
    assert harness.relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert not harness.relative_error(torch.tensor([3.0, float("nan")]), expected) <= 1
    with pytest.raises(ValueError, match="shape"):
        harness.relative_error(torch.zeros(3), expected)


def test_saved_bytes_count_storages_once_and_no_parameters():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward():
        hidden = x @ w.T  # keeps x and w
        return (
            hidden.sigmoid() * hidden[:4].sum()
        )  # keeps hidden (a view of it is summed, which keeps nothing), the sigmoid, the sum

    float_bytes = 4
    assert harness.saved_bytes(forward, [w]) == float_bytes * (8 * 4 + 8 * 4 + 1)
    assert harness.saved_bytes(forward, []) == float_bytes * (8 * 4 + 8 * 4 + 1 + 4 * 4)


def test_moe_mlp_saves_what_the_design_says():
    problem = moe_ops.build(TINY, "balanced", torch.float32, CPU)
    runner = moe_ops.own_runner(harness_backend("torch"), problem.inputs)
    slots = TINY.T * TINY.K
    floats = TINY.T * TINY.D + slots * 2 * TINY.F + slots  # x, the pre-activation, the routing weights
    integers = 2 * slots + TINY.E + 1
    assert harness.saved_bytes(runner.forward, runner.parameters) <= 4 * (floats + integers)


def harness_backend(name):
    return moe_ops.get_backend(name, CPU)


def test_useful_flops_are_those_of_routed_slots():
    ids = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    assert moe_ops.flops(ids, 10, 7) == {FORWARD: 6 * 3 * 70, TRAINING: 18 * 3 * 70}
    flagship = moe_ops.SHAPES[0]
    ids = moe_ops.route(flagship, "balanced", torch.Generator().manual_seed(0))
    assert moe_ops.flops(ids, flagship.D, flagship.F)[TRAINING] == 18 * 65_536 * 1280 * 448


@pytest.mark.parametrize("routing", moe_ops.ROUTINGS)
def test_routing_is_distinct_experts_in_the_right_proportions(routing):
    shape = moe_ops.Shape("s", 20_000, 16, 4, 8, 8)
    ids = moe_ops.route(shape, routing, torch.Generator().manual_seed(3))
    assert ids.dtype == torch.int32
    assert ids.is_contiguous()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    load = torch.bincount(ids.flatten(), minlength=16).sort(descending=True).values / (20_000 * 4 / 16)
    if routing == "balanced":
        assert load.max() < 1.05
        assert load.min() > 0.95
    else:
        assert load[0] > 2
        assert load[-1] < 0.6
    if routing != "balanced":  # with one choice the shares are the popularity itself
        single = moe_ops.route(shape._replace(K=1), routing, torch.Generator().manual_seed(3))
        share = torch.bincount(single.flatten(), minlength=16).sort(descending=True).values / 20_000
        law = torch.arange(1, 17) ** -0.8
        torch.testing.assert_close(share, law / law.sum(), atol=0.01, rtol=0)


def test_routing_weights_are_the_same_in_either_dtype():
    weights = moe_ops.make_inputs(TINY, "balanced", torch.bfloat16, CPU)["weights"]
    assert weights.dtype == torch.float32
    assert torch.equal(weights.bfloat16().float(), weights)


class InterleavedRival(rivals.Rival):
    """A rival with another layout: rows of its up projection alternate."""

    name = "interleaved"
    distribution = "no-such-distribution"
    modules = ("json",)
    needs_cuda = False

    def make(self, x, w_gate_up, w_down, ids, weights):
        ffn = w_down.shape[2]
        paired = rivals.leaf(w_gate_up.unflatten(1, (2, ffn)).transpose(1, 2).flatten(1, 2).contiguous())
        x, w_down, weights = rivals.leaf(x), rivals.leaf(w_down), rivals.leaf(weights)

        def ours(rows):
            return rows.unflatten(1, (ffn, 2)).transpose(1, 2).flatten(1, 2)

        def forward():
            return harness_backend("torch").moe_mlp(x, ours(paired).contiguous(), w_down, ids, weights)

        return rivals.MoeCall(forward, (x, paired, w_down, weights), lambda grads: (grads[0], ours(grads[1]), *grads[2:]))


def test_a_rival_is_checked_in_our_layouts():
    problem = moe_ops.build(TINY, "zipf0.8", torch.float32, CPU)
    runner = moe_ops.rival_runner(InterleavedRival(), problem)
    checked = harness.check(problem, runner, CPU)
    assert set(checked.errors) == {"out", "dx", "dw_gate_up", "dw_down", "dweights"}
    assert max(checked.errors.values()) < 1e-6
    upside_down = moe_ops.rival_runner(InterleavedRival(), problem)
    upside_down.name_results = lambda outputs, grads: runner.name_results(outputs, (grads[0], grads[1].flip(1), *grads[2:]))
    assert harness.check(problem, upside_down, CPU).errors["dw_gate_up"] > 0.1


def test_rivals_say_why_they_cannot_run_and_what_they_are():
    for rival in rivals.RIVALS:
        if rival.needs_cuda:
            assert rival().why_unavailable(CPU) == "needs a CUDA device, not cpu"
    assert rivals.why_not_importable(("no_such_module",)) == "ModuleNotFoundError: No module named 'no_such_module'"
    assert rivals.describe_version("torch", "torch") == machine.installed_version("torch")
    assert rivals.describe_version("torch", "no-such-distribution", "abc") == "commit abc"
    assert rivals.describe_version("json", "no-such-distribution").startswith("sources sha256 ")
    assert rivals.describe_version("no_such_module", "no-such-distribution") == "sources sha256 unknown"


@pytest.mark.parametrize("op", [*layer_ops.ROUTER_OPS, *layer_ops.LAYER_OPS], ids=lambda op: op.name)
def test_layer_ops_agree_in_bf16(op):
    sizes = op_jobs.SIZES[-1]
    problem = op_jobs.build(op, sizes, torch.bfloat16, CPU)
    ways = [lambda inputs: op.ours(harness_backend("torch"), inputs), *([op.eager] if op.eager else [])]
    for forward in ways:
        errors = harness.check(problem, op_jobs.prepare(op, forward, problem), CPU).errors
        assert max(errors.values()) < harness.TOLERANCE[torch.bfloat16], errors


def test_an_op_in_place_is_given_its_inputs_back():
    op = layer_ops.LAYER_OPS[3]
    assert op.name == "swiglu"
    problem = op_jobs.build(op, op_jobs.SIZES[-1], torch.float32, CPU)

    def in_place(inputs):
        (out,) = op.ours(harness_backend("torch"), inputs)
        inputs["gate_up"].data.mul_(2)  # after its last use in forward; the gradient is then that of another input
        return (out,)

    runner = op_jobs.prepare(op, in_place, problem)
    assert harness.check(problem, runner, CPU).errors["out"] < 1e-6


def test_expected_loss_by_parts():
    inputs = layer_ops._draw_loss(op_jobs.SIZES[-1], op_jobs.Draw(torch.float32, CPU))
    whole, parts = layer_ops.expected_loss(inputs, chunk=1000), layer_ops.expected_loss(inputs, chunk=7)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


def test_numbers_that_json_lacks(tmp_path):
    writer = report.Writer(tmp_path / "rows.jsonl", {})
    writer.write({"status": "wrong", "error": float("nan"), "errors": {"out": float("inf")}, "x": 1.23456789})
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert (row["error"], row["errors"], row["x"]) == ("nan", {"out": "inf"}, 1.2346)
    with pytest.raises(ValueError, match="status"):
        writer.write({"status": "fine"})


def test_table_groups_cases_and_compares_with_ours():
    def row(provider, milliseconds):
        times = {"p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds}
        return {
            "op": "o",
            "shape": "s",
            "pass": FORWARD,
            "provider": provider,
            "status": "ok",
            **times,
            "peak_bytes": 2_000_000,
        }

    lines = report.table([row("torch", 2.0), row("triton", 1.0)]).splitlines()
    assert [line.split()[4] for line in lines[1:]] == ["triton", "torch"]
    assert lines[2].split()[5:8] == ["2", "2-2", "2.00"]
    assert report.table([])


def test_command_line():
    shapes = [shape.name for shape in run.choose_shapes(run.parse(["--shapes", "flagship,e256", "--device", "cuda"]))]
    assert shapes == ["flagship-16k", "flagship-4k", "flagship-64k", "e256"]
    assert [shape.name for shape in run.choose_shapes(run.parse(["--quick", "--device", "cuda"]))] == ["flagship-16k"]
    assert "tiny" not in [shape.name for shape in run.choose_shapes(run.parse(["--device", "cuda"]))]
    assert not run.choose_rivals(run.parse(["--rivals", "none"]))
    (rival,) = run.choose_rivals(run.parse(["--rivals", "liger", "--rival-commit", "liger=abc"]))
    assert (rival.name, rival.commit) == ("liger", "abc")
    for wrong in (["--shapes", "huge"], ["--rivals", "fastmoe"]):
        with pytest.raises(SystemExit):
            run.parse(wrong)
    assert run.default_output("NVIDIA H200").name == "h200.jsonl"
    assert run.default_output("NVIDIA A100-SXM4-80GB").name == "a100-sxm4-80gb.jsonl"


@pytest.mark.parametrize("op", tune.OPS)
def test_the_tuner_checks_a_candidate_against_torch(op, monkeypatch):
    """Its inputs, its launch and its comparison, in the interpreter: a right config passes, and a result off by 5% does not."""
    if not launch.INTERPRETED:
        pytest.skip("a machine with a GPU runs the kernels there")
    for name, value in {"DEVICE": "cpu", "E": 4, "K": 2, "D": 72, "F": 40}.items():
        monkeypatch.setattr(tune, name, value)
    caches = (tune.problem, tune._tiles, tune.expected)
    for cached in caches:
        cached.cache_clear()
    (config,) = configs._INTERPRETER[op]
    assert tune.difference(op, config, 40, "zipf") <= tune.TOLERANCE
    off = [1.05 * result.float() for result in tune.expected(op, 40, "zipf")]
    monkeypatch.setattr(tune, "expected", lambda *_: off)
    assert tune.difference(op, config, 40, "zipf") > tune.TOLERANCE
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("arch", [80, 90])
def test_the_tuner_tries_every_candidate_of_the_chip(arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (arch // 10, arch % 10))
    found = tune.jobs(list(tune.OPS))
    assert {(job.op, job.config) for job in found} >= {
        (op, config) for op, candidates in configs.CANDIDATES[arch].items() for config in candidates
    }
    assert found == sorted(found, key=lambda job: job.config.specialize)  # what may hang comes last


def test_the_tuner_needs_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--output", str(tmp_path / "tune.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 1
    assert "needs a CUDA device" in capsys.readouterr().out


def test_without_a_gpu_make_says_that_nothing_was_run(tmp_path):
    """Neither rows of a CPU among those of GPUs, nor a test that counts as passed."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    root, venv = Path(__file__).parents[2], Path(sys.executable).parents[1]
    command = ["make", "--keep-going", "-o", f"{venv}/.installed-dev", f"VENV={venv}", f"BENCH_DATA={tmp_path}"]
    # not as a part of the make that runs the tests
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = own | {"CUDA_VISIBLE_DEVICES": ""}
    targets = ("test-gpu", "bench-gpu")
    done = subprocess.run(
        [*command, *targets], cwd=root, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [f"NOT RUN: make {target} needs a CUDA device, and this torch sees none" for target in targets]
    assert done.returncode == 2
    assert not done.stdout.strip()
    assert not list(tmp_path.iterdir())


def test_list_measures_nothing(capsys):
    assert run.main(["--device", "cpu", "--list"]) == 0
    out = capsys.readouterr().out
    assert "0: moe_mlp: tiny balanced" in out
    assert "scattermoe: unavailable: needs a CUDA device" in out


def documented_fields():
    """Of a row, as the README lists them: what its table's first column names."""
    table = Path(run.__file__).with_name("README.md").read_text().partition("## Rows")[2]
    return {
        name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


SOMETIMES = {"routing", "largest_load", "note", "reason", *"TEKDFPHdV"}
ROOFLINES = ({"tflops", "share_of_matmul"}, {"gbs", "share_of_copy"})


@pytest.mark.parametrize("suite", run.SUITES)
def test_dry_run(suite, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert run.main(["--device", "cpu", "--suite", suite, "--quick", "--repeats", "3", "--output", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["status"] for row in rows if row["provider"] in ("torch", "reference", "eager")} == {"ok"}
    fields = documented_fields()
    for row in (row for row in rows if row["status"] == "ok"):
        assert row.keys() <= fields | SOMETIMES
        assert fields <= row.keys() | SOMETIMES | set.union(*ROOFLINES)
        assert any(roofline <= row.keys() for roofline in ROOFLINES)
    ops = {
        "moe": {"moe_mlp"},
        "router": {op.name for op in layer_ops.ROUTER_OPS},
        "layer": {op.name for op in layer_ops.LAYER_OPS},
    }
    assert {row["op"] for row in rows} == ops[suite]
    unavailable = {row["provider"] for row in rows if row["status"] == "unavailable"}
    expected = {"moe": {"scattermoe", "megablocks", "sonicmoe", "liger"}, "router": set(), "layer": {"liger"}}
    assert expected[suite] <= unavailable
    assert "p50 ms" in capsys.readouterr().out
