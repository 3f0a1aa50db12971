"""Benchmark the kernels beside their rivals: `python kernels/benchmarks/run.py`, or `make bench-gpu`. See README.md here."""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import layer_ops
import moe_ops
import op_jobs
import precompile
import torch
from harness import Budget, DeviceLost, Job, Session, Settings
from machine import Monitor, describe
from report import Writer, table
from rivals import RIVALS, Rival

SUITES = ("moe", "router", "layer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUICK_SHAPES = ("flagship-16k",)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), default="all", help="what to measure")
    add("--shapes", help="names, or beginnings of names, of MoE shapes, by comma (see --list); default: all but tiny")
    add("--routings", default=",".join(moe_ops.ROUTINGS), help="balanced, zipfS with the exponent S; by comma")
    add("--rivals", default="all", help="all, none, or names by comma (see --list)")
    add("--output", type=Path, help="JSON lines to append to; default: data/<GPU>.jsonl beside this file")
    add("--quick", action="store_true", help="the main shape, balanced, without torch.compile")
    add("--budget", type=float, help="seconds after which nothing new is started")
    add("--setup-limit", type=float, default=Settings().setup_limit, help="seconds for a provider's first calls; 0: no limit")
    add("--repeats", type=int, default=Settings().repeats, help="timed calls of each provider, at least")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: a dry run")
    add("--dtype", choices=DTYPES, help="default: bf16 on CUDA, fp32 on the CPU")
    add("--compile-threads", type=int, help="for the candidates of rivals' autotuners; 1: serial; default: up to 16")
    add("--commit", help="our commit, where the source tree has no .git")
    add("--rival-commit", action="append", default=[], metavar="NAME=HASH", help="a rival's commit, for its rows")
    add("--start-at", type=int, default=0, metavar="JOB", help="number of the first job, from 0")
    add("--list", action="store_true", help="print the jobs and who can run, and measure nothing")
    options = parser.parse_args(arguments)
    try:
        choose_shapes(options)
        choose_rivals(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def choose_shapes(options: argparse.Namespace) -> list[moe_ops.Shape]:
    """The MoE shapes asked for."""
    if not options.shapes:
        names = ["tiny"] if options.device == "cpu" else QUICK_SHAPES if options.quick else None
        return [shape for shape in moe_ops.SHAPES if (shape.name in names if names else shape.name != "tiny")]
    names = options.shapes.split(",")
    for name in names:
        if not any(shape.name.startswith(name) for shape in moe_ops.SHAPES):
            raise ValueError(f"--shapes: {name!r} is none of {', '.join(shape.name for shape in moe_ops.SHAPES)}")
    return [shape for shape in moe_ops.SHAPES if any(shape.name.startswith(name) for name in names)]


def choose_rivals(options: argparse.Namespace) -> list[Rival]:
    """The rivals asked for, with the commits that were said."""
    known = {rival.name: rival for rival in RIVALS}
    names = {"all": list(known), "none": []}.get(options.rivals, options.rivals.split(","))
    commits = dict(pair.partition("=")[::2] for pair in options.rival_commit)
    for name in (*names, *commits):
        if name not in known:
            raise ValueError(f"--rivals: {name!r} is none of all, none, {', '.join(known)}")
    rivals = [known[name]() for name in known if name in names]
    for rival in rivals:
        rival.commit = commits.get(rival.name)
    return rivals


def plan(options: argparse.Namespace) -> list[Job]:
    """All jobs, the most telling first."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = DTYPES[options.dtype] if options.dtype else torch.bfloat16 if cuda else torch.float32
    backends = ("triton", "torch") if cuda else ("torch", "reference")
    rivals = choose_rivals(options)
    sizes = next(sizes for sizes in op_jobs.SIZES if (sizes.name == "tiny") != cuda)
    extras = {rival.name for rival in rivals} | ({"compile"} if cuda and not options.quick else set())
    routings = options.routings.split(",")[: 1 if options.quick else None]
    jobs: list[Job] = []
    if options.suite in ("moe", "all"):
        jobs += moe_ops.jobs(choose_shapes(options), routings, rivals, backends, device, dtype)
    if options.suite in ("router", "all"):
        jobs += op_jobs.jobs(layer_ops.ROUTER_OPS, sizes, sorted(extras), backends, device, dtype)
    if options.suite in ("layer", "all"):
        jobs += op_jobs.jobs(layer_ops.LAYER_OPS, sizes, sorted(extras), backends, device, dtype)
    return jobs


def print_plan(jobs: Sequence[Job]) -> None:
    """Jobs and providers, with the reason of those that cannot run."""
    for number, job in enumerate(jobs):
        print(f"{number}: {job.op}: {job.label}")
    for name, provider in {provider.name: provider for job in jobs for provider in job.providers}.items():
        reason = provider.why_unavailable()
        print(f"{name}: {provider.version() if reason is None else f'unavailable: {reason}'}")


def default_output(gpu: str) -> Path:
    """data/h200.jsonl for 'NVIDIA H200'."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    return Path(__file__).parent / "data" / f"{slug or 'unknown'}.jsonl"


def restart(lost: DeviceLost, options: argparse.Namespace, budget: Budget) -> None:
    """Go on in a fresh process: without the rival that lost the device, or after the job in which one of ours did."""
    rivals = [rival.name for rival in choose_rivals(options)]
    start = lost.job if lost.provider in rivals else lost.job + 1
    left = ",".join(name for name in rivals if name != lost.provider) or "none"
    print(f"{lost}; going on in a new process at job {start}, rivals: {left}", flush=True)
    changed = ["--start-at", str(start), "--rivals", left]
    if options.budget is not None:
        changed += ["--budget", str(max(budget.deadline - time.monotonic(), 0.0))]
    os.execv(sys.executable, [sys.executable, *sys.argv, *changed])  # a later option overrides an earlier one


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append rows, print the table; 1 where one of our own backends was wrong or failed."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device; --device cpu is a dry run", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # the references are fp32, and not TF32
    budget = Budget(options.budget)
    jobs = plan(options)
    if options.list:
        print_plan(jobs)
        return 0
    device = torch.device(options.device)
    if device.type == "cuda":
        precompile.enable(options.compile_threads)
    run = describe(device, options.commit)
    writer = Writer(options.output or default_output(run["gpu"] if device.type == "cuda" else "cpu"), run)
    settings = Settings(repeats=options.repeats, setup_limit=options.setup_limit)
    with Monitor(device) as monitor:
        session = Session(device, writer, monitor, settings, budget)
        ceilings = session.ceilings
        print(f"{run['gpu']}: product {ceilings.matmul_tflops:.4g} TFLOP/s, copy {ceilings.copy_gbs:.4g} GB/s", flush=True)
        lost = None
        try:
            session.run(jobs, options.start_at)
        except DeviceLost as error:
            lost = error
    print(table(writer.rows), flush=True)
    if lost is not None:
        restart(lost, options, budget)
    if session.left_out:
        print("left out, as the budget was spent:", *session.left_out, sep="\n  ")
    print(f"rows appended to {writer.path}")
    ours = [row for row in writer.rows if row["provider"] in ("triton", "torch")]
    return int(any(row["status"] in ("wrong", "failed") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
