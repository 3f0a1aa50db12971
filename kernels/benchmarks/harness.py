"""How everything is measured: each provider of an op is checked against an fp32 reference, and those that pass take turns.

A `Problem` is an op at one shape with its inputs and the expected results. A `Provider` turns it into a `Runner`, in the layouts that
it wants; what that costs is not timed. A run is a list of `Job`s.
"""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from types import FrameType
from typing import Any, NamedTuple

import torch
from machine import Ceilings, Monitor, Window
from report import Row, Writer, one_line
from torch import Tensor

FORWARD, TRAINING = "fwd", "fwd+bwd"
# ||error|| / ||reference|| of any output or gradient, against fp32 of the same rounded inputs. A right bf16 kernel stays below 0.01.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass
class Problem:
    """An op at one shape."""

    op: str
    shape: str  # its name
    sizes: dict[str, int]
    routing: str | None
    dtype: torch.dtype
    inputs: dict[str, Any]
    expected: dict[str, Tensor]  # outputs and gradients by name, fp32 or better
    flops: dict[str, float] = field(default_factory=dict)  # by pass, where arithmetic is the roofline
    traffic: dict[str, float] = field(default_factory=dict)  # bytes by pass, where bandwidth is
    passes: tuple[str, ...] = (FORWARD, TRAINING)
    facts: dict[str, Any] = field(default_factory=dict)  # further row fields

    def row(self) -> Row:
        """The fields that all rows of this problem share."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": self.op, "shape": self.shape, **self.sizes, "routing": self.routing, "dtype": dtype, **self.facts}


@dataclass
class Runner:
    """One provider at one problem. `forward` returns the differentiable outputs, in the order of `upstream`."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    name_results: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], dict[str, Tensor]]  # (outputs, gradients) as in `expected`
    parameters: tuple[Tensor, ...] = ()  # not counted among what is saved for backward
    restore: Callable[[], None] = lambda: None  # undoes what an in-place rival did to its inputs
    note: str = ""

    def train(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs and the gradients of the leaves."""
        outputs = self.forward()
        return outputs, torch.autograd.grad(outputs, self.leaves, self.upstream)

    def call(self, which: str) -> Callable[[], object]:
        """What is timed."""
        return self.forward if which == FORWARD else self.train


class Provider(NamedTuple):
    """An implementation of an op."""

    name: str
    version: Callable[[], str]
    why_unavailable: Callable[[], str | None]
    prepare: Callable[[Problem], Runner]


class Job(NamedTuple):
    """One problem, built when its turn comes, and who solves it."""

    op: str
    label: str
    build: Callable[[], Problem]
    providers: Sequence[Provider]


class Checked(NamedTuple):
    """What one checked run tells."""

    errors: dict[str, float]
    deterministic: bool  # two runs gave the same bits
    saved_bytes: int
    peak_bytes: dict[str, int | None]  # by pass: the most that was allocated above what was there before the call


class Timing(NamedTuple):
    """Milliseconds per call."""

    p20: float
    p50: float
    p80: float
    repeats: int
    windows: tuple[Window, ...]


class Settings(NamedTuple):
    """How long to measure."""

    repeats: int = 30  # at least
    seconds: float = 0.25  # per provider and pass, where calls are short
    rounds: int = 3
    setup_limit: float = 240.0  # seconds for a provider's first calls, where it compiles and tunes; 0: none
    warm_up: float = 2.0  # seconds of products before the ceilings, to settle the clocks


class Budget:
    """Seconds after which nothing new is started; None: no end."""

    def __init__(self, seconds: float | None) -> None:
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def spent(self) -> bool:
        """Whether to stop."""
        return time.monotonic() >= self.deadline


class SetupTooLong(Exception):
    """A provider's first calls took longer than the limit."""


class DeviceLost(Exception):
    """A provider left the device in a state (an illegal address, say) in which this process can use it no more."""

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(f"{provider} lost the device: {reason}")
        self.provider, self.reason = provider, reason
        self.job = 0  # the one that was under way


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise SetupTooLong in this (the main) thread after `seconds`, at the next step that is Python's; 0: never."""
    if not seconds:
        yield
        return

    def stop(_: int, frame: FrameType | None) -> None:
        raise SetupTooLong(f"the first calls took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN and infinity stay what they are."""
    if actual.shape != expected.shape:
        raise ValueError(f"a result has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    difference = torch.linalg.vector_norm(actual.detach().to(expected.dtype) - expected, dtype=torch.float64)
    norm = torch.linalg.vector_norm(expected, dtype=torch.float64)
    return float(difference / norm) if float(norm) else float(difference)


def saved_bytes(forward: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward: whole storages, each counted once, without those of the parameters."""
    ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may be an output: it would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until here, so that no address is used twice
    del kept
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory allocated during a call above what was allocated before it; None off CUDA."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def check(problem: Problem, runner: Runner, device: torch.device) -> Checked:
    """Compare outputs and gradients with the expected ones, twice, and count memory."""
    runner.restore()
    first = runner.name_results(*runner.train())
    if first.keys() != problem.expected.keys():
        raise ValueError(f"results are {sorted(first)}, expected {sorted(problem.expected)}")
    errors = {name: relative_error(first[name], expected) for name, expected in problem.expected.items()}
    runner.restore()
    second = runner.name_results(*runner.train())
    same = all(torch.equal(first[name], second[name]) for name in first)
    del first, second
    saved = saved_bytes(runner.forward, runner.parameters)
    peaks = {which: peak_bytes(runner.call(which), device) for which in problem.passes}
    return Checked(errors, same, saved, peaks)


def sample(call: Callable[[], object], repeats: int, device: torch.device, flush: Tensor) -> list[float]:
    """Milliseconds of each of `repeats` calls. On CUDA the cache is overwritten before each, and the host runs ahead of the device."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def time_in_turns(
    calls: dict[str, Callable[[], object]], settings: Settings, device: torch.device, flush: Tensor
) -> dict[str, Timing | str]:
    """Time several calls in alternating rounds, so that a drift of the clocks meets all of them; a string says why one failed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    windows: dict[str, list[Window]] = {name: [] for name in calls}
    per_round: dict[str, int] = {}
    failed: dict[str, Timing | str] = {}
    for turn in range(settings.rounds + 1):  # the first one warms up and tells how many repeats fit
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                start = time.monotonic()
                taken = sample(call, per_round.get(name, 3), device, flush)
                if turn:
                    times[name] += taken
                    windows[name].append((start, time.monotonic()))
                else:
                    per_round[name] = _repeats(min(taken) / 1e3, settings)
            except Exception as error:  # whatever a provider raises, the others go on
                failed[name] = reason = one_line(error)
                recover(device, name, reason)
    return failed | {name: _timing(times[name], windows[name]) for name in calls if name not in failed}


def _repeats(seconds: float, settings: Settings) -> int:
    """Repeats per round: at least `settings.repeats` in all rounds, and more of a short call, up to ten times as many."""
    wanted = min(max(settings.repeats, settings.seconds / max(seconds, 1e-9)), 10 * settings.repeats)
    return math.ceil(wanted / settings.rounds)


def _timing(times: Sequence[float], windows: Sequence[Window]) -> Timing:
    fifths = quantiles(times, n=10, method="inclusive")
    return Timing(fifths[1], fifths[4], fifths[7], len(times), tuple(windows))


def flush_buffer(device: torch.device) -> Tensor:
    """Larger than any cache, so that zeroing it leaves none of a call's inputs there."""
    return torch.empty(256 * 2**20 if device.type == "cuda" else 0, dtype=torch.int8, device=device)


def measure_ceilings(device: torch.device, settings: Settings, flush: Tensor) -> Ceilings:
    """A product of random bf16 squares and a copy, both large on a GPU and token ones on a CPU."""
    cuda = device.type == "cuda"
    size, count = (8192, 2**31) if cuda else (256, 2**20)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    deadline = time.monotonic() + (settings.warm_up if cuda else 0)
    while time.monotonic() < deadline:
        sample(lambda: torch.mm(a, b), 20, device, flush)
    repeats = max(settings.repeats, 3)
    product = _timing(sample(lambda: torch.mm(a, b), repeats, device, flush), ()).p50
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    copy = _timing(sample(lambda: target.copy_(source), repeats, device, flush), ()).p50
    return Ceilings(2 * size**3 / product / 1e9, 2 * count / copy / 1e6)


@dataclass
class Session:
    """One run: where rows go, what the chip can do, and what was left out when the time was up."""

    device: torch.device
    writer: Writer
    monitor: Monitor
    settings: Settings = field(default_factory=Settings)
    budget: Budget = field(default_factory=lambda: Budget(None))
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flush = flush_buffer(self.device)
        self.ceilings = measure_ceilings(self.device, self.settings, self.flush)
        _free(self.device)

    def run(self, jobs: Sequence[Job], start: int = 0) -> None:
        """Do all jobs from the one numbered `start`, as far as the budget goes. Raises DeviceLost, after a row that says so."""
        usable = self._list_unavailable(jobs)
        for number, job in enumerate(jobs[start:], start):
            providers = [provider for provider in job.providers if (job.op, provider.name) in usable]
            if self.budget.spent():
                self.left_out.append(f"{job.label}: {', '.join(provider.name for provider in providers)}")
                continue
            try:
                self._run_job(job, providers)
            except DeviceLost as lost:
                lost.job = number
                raise
            _free(self.device)

    def _run_job(self, job: Job, providers: Sequence[Provider]) -> None:
        try:
            problem = job.build()
        except Exception as error:  # too large for this device, say; the other shapes go on
            row = {"op": job.op, "shape": job.label, "provider": "reference"}
            self.writer.write(row | {"status": "failed", "reason": one_line(error)})
            recover(self.device, "reference", one_line(error))
            return
        self._run_problem(problem, job.label, providers)

    def _list_unavailable(self, jobs: Sequence[Job]) -> set[tuple[str, str]]:
        """Write a row for each op and provider that cannot run; returns the ones that can."""
        usable: set[tuple[str, str]] = set()
        wanted = {(job.op, provider.name): provider for job in jobs for provider in job.providers}
        for (op, name), provider in wanted.items():
            reason = provider.why_unavailable()
            if reason is None:
                usable.add((op, name))
            else:
                self.writer.write({"op": op, "provider": name, "status": "unavailable", "reason": reason})
        return usable

    def _run_problem(self, problem: Problem, label: str, providers: Sequence[Provider]) -> None:
        runners: dict[str, Runner] = {}
        rows: dict[str, tuple[Row, Checked]] = {}
        for provider in providers:
            if self.budget.spent():
                self.left_out.append(f"{label}: {provider.name}")
                continue
            row, runner, checked = self._prepare(problem, provider)
            if runner is not None and checked is not None:
                runners[provider.name], rows[provider.name] = runner, (row, checked)
        for which in problem.passes:
            if self.budget.spent():
                self.left_out.append(f"{label} {which}: {', '.join(runners)}")
                continue
            calls = {name: runner.call(which) for name, runner in runners.items()}
            try:
                timings = time_in_turns(calls, self.settings, self.device, self.flush)
            except DeviceLost as lost:
                self._write(problem, which, *rows[lost.provider], lost.reason)
                raise
            for name, timing in timings.items():
                self._write(problem, which, *rows[name], timing)

    def _prepare(self, problem: Problem, provider: Provider) -> tuple[Row, Runner | None, Checked | None]:
        """Set a provider up and check it; writes a row and returns no runner where that fails."""
        row = problem.row() | {"provider": provider.name, "provider_version": provider.version()}
        start = time.monotonic()
        try:
            with time_limit(self.settings.setup_limit):
                runner = provider.prepare(problem)
                checked = check(problem, runner, self.device)
        except Exception as error:  # whatever a provider raises, the others go on
            self.writer.write(row | {"status": "failed", "reason": one_line(error), "setup_s": time.monotonic() - start})
            recover(self.device, provider.name, one_line(error))
            return row, None, None
        row |= {"errors": checked.errors, "error": _largest(checked.errors), "setup_s": time.monotonic() - start}
        row |= {"note": runner.note} if runner.note else {}
        wrong = {name: error for name, error in checked.errors.items() if not error <= TOLERANCE[problem.dtype]}
        if wrong:
            reason = "err=" + ", ".join(f"{error:.1e} ({name})" for name, error in wrong.items())
            self.writer.write(row | {"status": "wrong", "reason": reason})
            return row, None, None
        return row, runner, checked

    def _write(self, problem: Problem, which: str, row: Row, checked: Checked, timing: Timing | str) -> None:
        row = row | {"pass": which, "peak_bytes": checked.peak_bytes[which], "deterministic": checked.deterministic}
        row["saved_bytes"] = checked.saved_bytes
        if isinstance(timing, str):
            self.writer.write(row | {"status": "failed", "reason": timing})
            return
        clock, power = self.monitor.during(timing.windows)
        row |= {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80, "repeats": timing.repeats}
        row |= {"sm_clock_mhz": clock, "power_w": power, **self._rates(problem, which, timing.p50)}
        self.writer.write(row | {"status": "ok"})

    def _rates(self, problem: Problem, which: str, milliseconds: float) -> Row:
        row: Row = {"matmul_ceiling_tflops": self.ceilings.matmul_tflops, "copy_ceiling_gbs": self.ceilings.copy_gbs}
        if which in problem.flops:
            row["tflops"] = problem.flops[which] / milliseconds / 1e9
            row["share_of_matmul"] = row["tflops"] / self.ceilings.matmul_tflops
        if which in problem.traffic:
            row["gbs"] = problem.traffic[which] / milliseconds / 1e6
            row["share_of_copy"] = row["gbs"] / self.ceilings.copy_gbs
        return row


def _largest(errors: dict[str, float]) -> float:
    """The largest error, and NaN if any is NaN."""
    return next((error for error in errors.values() if math.isnan(error)), max(errors.values()))


def recover(device: torch.device, provider: str, reason: str) -> None:
    """Free what a failed call left; raises DeviceLost where the device no longer answers."""
    try:
        _free(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(provider, reason) from error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
