"""Time every candidate config of every op of the expert MLP on this GPU, and print the table that configs.py should hold.

    python kernels/benchmarks/tune.py --output tune.json [--ops up,down] [--tokens 16384,4096,65536]

Candidates are compiled first, in parallel processes that share Triton's cache. Then one process at a time checks each against torch
(at the first token count) and times it; a candidate that fails to compile, gives wrong numbers, crashes the device or hangs is a row of
the table, and the next one starts in a fresh process. Rows are written to --output as they come.

Shapes: E 16, K 4, D 1,280, F 448, bf16; routing balanced (random experts, all equally popular) and zipf (popularity 1 / rank).
"""

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_kernels import configs
from moe_kernels.configs import FLAGSHIP, Config
from moe_kernels.types import TileMap

DEVICE = "cuda"
OPS = ("up", "down", "da", "dxe", "dw1", "dw2", "combine")
ROUTINGS = ("balanced", "zipf")
E, K, D, F = FLAGSHIP["E"], FLAGSHIP["K"], FLAGSHIP["D"], FLAGSHIP["F"]
FLOPS_PER_TOKEN = {"up": 4 * K * D * F, "down": 2 * K * D * F, "da": 2 * K * D * F, "dxe": 4 * K * D * F, "dw1": 4 * K * D * F,
                   "dw2": 2 * K * D * F, "combine": 2 * K * D}  # fmt: skip
TOLERANCE = 2e-2  # largest difference from torch's bf16 result, relative to the largest entry
HANG_S = 40.0  # a candidate that says nothing for so long is given up


@dataclass(frozen=True)
class Job:
    op: str
    config: Config


class Problem(NamedTuple):
    """One shape and routing, with every intermediate that some op reads, made by torch."""

    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    weights: Tensor
    grad: Tensor
    offsets: Tensor
    row_slot: Tensor
    slot_row: Tensor
    z: Tensor
    y: Tensor
    rows: Tensor
    dz: Tensor
    ya: Tensor


def jobs(ops: list[str]) -> list[Job]:
    """Every candidate of this GPU's architecture and what the flagship shape uses now, the simple variants first."""
    arch = max(a for a in configs.CANDIDATES if a <= 10 * torch.cuda.get_device_capability()[0])
    candidates = [Job(op, config) for op in ops for config in configs.CANDIDATES[arch][op]]
    in_use = [
        Job(entry.op, entry.config) for entry in configs.entries(*ops) if entry.kind == "flagship" and arch in entry.archs
    ]
    found = dict.fromkeys((*candidates, *in_use))
    risk = lambda job: (job.config.specialize, job.config.flatten, job.config.persistent, job.config.variant == "tma")  # noqa: E731
    return sorted(found, key=lambda job: (job.config.specialize, OPS.index(job.op), risk(job)))


@cache
def problem(tokens: int, routing: str) -> Problem:
    from moe_kernels.grouped_mm.with_torch import rows_by_weights
    from moe_kernels.permutation.with_torch import copy_rows, sort_slots

    torch.manual_seed(0)
    popularity = torch.ones(E) if routing == "balanced" else 1.0 / torch.arange(1, E + 1)
    ids = (torch.rand(tokens, E) ** (1.0 / popularity)).topk(K, dim=1).indices.int().to(DEVICE)
    normal = lambda *shape, scale=1.0: (torch.randn(*shape, device=DEVICE) * scale).bfloat16()  # noqa: E731
    x, grad = normal(tokens, D), normal(tokens, D)
    w_gate_up, w_down = normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
    weights = torch.rand(tokens, K, device=DEVICE)
    index = sort_slots(ids, E)
    z = rows_by_weights(copy_rows(x, *index), w_gate_up.mT, index[0])
    gate, up = z.float().chunk(2, dim=-1)
    y = (torch.nn.functional.silu(gate) * up).bfloat16()
    rows = rows_by_weights(y, w_down.mT, index[0])
    dz, ya = _gradients(z, rows_by_weights(copy_rows(grad, *index), w_down, index[0]), weights.flatten()[index[1].long()])[:2]
    return Problem(x, w_gate_up, w_down, weights, grad, *index, z, y, rows, dz, ya)


def _gradients(z: Tensor, grad_y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz, ya and the routing gradient by row."""
    gate, up = z.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    y, scaled = gate * sigmoid * up, grad_y.float() * scale[:, None]
    dz = torch.cat([scaled * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), scaled * gate * sigmoid], dim=-1)
    return dz.bfloat16(), (y * scale[:, None]).bfloat16(), (grad_y.float() * y).sum(-1)


@cache
def _tiles(tokens: int, routing: str, block_rows: int) -> TileMap:
    from moe_kernels.permutation.with_triton import map_tiles

    p = problem(tokens, routing)
    return map_tiles(p.offsets, p.row_slot.shape[0], block_rows)


def run(op: str, config: Config, tokens: int, routing: str) -> tuple[Tensor, ...]:
    """Launch `op` once with `config`."""
    from moe_kernels.grouped_mm.with_triton import rows_outer, rows_product
    from moe_kernels.moe_mlp.with_triton import down_gradient, up_swiglu
    from moe_kernels.permutation.with_triton import sum_rows

    p = problem(tokens, routing)
    tiles = _tiles(tokens, routing, config.block_m) if op in ("up", "down", "da", "dxe") else None
    with configs.override({op: config}):
        if op == "up":
            return up_swiglu(p.x, p.w_gate_up, p.offsets, p.row_slot, K, config, tiles)
        if op == "down":
            return (rows_product(op, p.y, p.w_down, p.offsets, True, tiles),)
        if op == "da":
            return down_gradient(p.grad, p.w_down, p.weights, p.z, p.offsets, p.row_slot, config, tiles)
        if op == "dxe":
            return (rows_product(op, p.dz, p.w_gate_up, p.offsets, False, tiles),)
        if op == "dw1":
            return (rows_outer(op, p.dz, p.x, p.offsets, p.row_slot, gather_b=K),)
        if op == "dw2":
            return (rows_outer(op, p.grad, p.ya, p.offsets, p.row_slot, gather_a=K),)
        return (sum_rows(p.rows, p.offsets, p.row_slot, p.slot_row, p.weights),)


@cache
def expected(op: str, tokens: int, routing: str) -> tuple[Tensor, ...]:
    """The same by torch."""
    from moe_kernels.grouped_mm.with_torch import rows_by_rows, rows_by_weights
    from moe_kernels.permutation.with_torch import copy_rows, sum_rows

    p = problem(tokens, routing)
    index = (p.offsets, p.row_slot, p.slot_row)
    if op == "up":
        return p.z, p.y
    if op == "down":
        return (p.rows,)
    if op == "da":
        grad_y = rows_by_weights(copy_rows(p.grad, *index), p.w_down, p.offsets)
        return _gradients(p.z, grad_y, p.weights.flatten()[p.row_slot.long()])
    if op == "dxe":
        return (rows_by_weights(p.dz, p.w_gate_up, p.offsets),)
    if op == "dw1":
        return (rows_by_rows(p.dz, copy_rows(p.x, *index), p.offsets),)
    if op == "dw2":
        return (rows_by_rows(copy_rows(p.grad, *index), p.ya, p.offsets),)
    return (sum_rows(p.rows, *index, p.weights),)


def difference(op: str, config: Config, tokens: int, routing: str) -> float:
    """The largest difference from torch, relative to the largest entry; infinite where the result is not finite."""
    worst = 0.0
    for actual, reference in zip(run(op, config, tokens, routing), expected(op, tokens, routing), strict=True):
        if op == "da" and actual.dim() == 2 and actual.dtype == torch.float32:
            actual = actual.sum(0)  # partial sums of the routing gradient
        error = (actual.float() - reference.float()).abs().max() / reference.float().abs().max()
        worst = max(worst, float(error) if torch.isfinite(actual).all() else float("inf"))
    return worst


def time_candidates(op: str, config: Config, shapes: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """One row for each shape: p20, p50 and p80 in microseconds (L2 flushed in between) and TFLOP/s, after a check of each routing."""
    import triton

    error = max(difference(op, config, *shape) for shape in shapes[: len(ROUTINGS)])
    if not error <= TOLERANCE:
        raise ArithmeticError(f"differs from torch by {error:.1e} of the largest entry")
    for tokens, routing in shapes:
        call = lambda tokens=tokens, routing=routing: run(op, config, tokens, routing)  # noqa: E731
        call()
        low, median, high = triton.testing.do_bench(call, warmup=5, rep=25, quantiles=[0.2, 0.5, 0.8])
        yield {"tokens": tokens, "routing": routing, "p20_us": 1e3 * low, "p50_us": 1e3 * median, "p80_us": 1e3 * high,
               "tflops": FLOPS_PER_TOKEN[op] * tokens / median / 1e9, "error": error}  # fmt: skip


def compile_job(job: Job) -> str:
    """Compile by running once on few tokens (token counts are run-time arguments); returns what went wrong, or nothing."""
    try:
        run(job.op, job.config, 256, "balanced")
        torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler or the driver raises is this candidate's result
        return f"{type(error).__name__}: {str(error).strip()[:160]}"
    return ""


def compile_all(todo: list[Job], workers: int, limit_s: float) -> dict[Job, str]:
    """What went wrong with each job that did not compile in time."""
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"))
    futures = {job: pool.submit(compile_job, job) for job in todo}
    failures, deadline = {}, time.monotonic() + limit_s
    for job, future in futures.items():
        try:
            if problem_found := future.result(timeout=max(0.1, deadline - time.monotonic())):
                failures[job] = problem_found
        except Exception as error:  # a time-out, or a worker that the candidate took down
            failures[job] = f"compile: {type(error).__name__}"
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    return failures


def measure(todo: list[Job], shapes: list[tuple[int, str]], pipe: Connection) -> None:
    """The body of a measuring process: sends (index of the job, rows, what went wrong, whether the process can go on)."""
    for index, job in enumerate(todo):
        try:
            rows = list(time_candidates(job.op, job.config, shapes))
            pipe.send((index, rows, "", True))
        except Exception as error:
            usable = not ("CUDA" in str(error) or "illegal" in str(error))  # else the context is lost
            pipe.send((index, [], f"{type(error).__name__}: {str(error).strip()[:160]}", usable))
            if not usable:
                return


def measure_all(todo: list[Job], shapes: list[tuple[int, str]]) -> Iterator[tuple[Job, list[dict[str, Any]], str]]:
    """Results in order, each as soon as it is there; a process that dies or hangs costs one candidate."""
    context = mp.get_context("spawn")
    while todo:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(todo, shapes, send), daemon=True)
        process.start()
        send.close()
        done, patience = 0, HANG_S + 60  # the first one also makes the inputs
        while done < len(todo):
            try:
                if not receive.poll(patience):
                    raise TimeoutError
                index, rows, wrong, usable = receive.recv()
            except (TimeoutError, EOFError) as error:
                yield todo[done], [], "hung" if isinstance(error, TimeoutError) else "the process died"
                done += 1
                break
            yield todo[index], rows, wrong
            done, patience = index + 1, HANG_S
            if not usable:
                break
        process.kill()
        process.join()
        todo = todo[done:]


def whole_op(choices: dict[str, Config], tokens: int, routing: str) -> dict[str, float]:
    """Forward and forward + backward of moe_mlp in microseconds, triton with `choices` and torch."""
    import triton

    from moe_kernels.moe_mlp import with_torch, with_triton

    p = problem(tokens, routing)
    ids = torch.empty_like(p.slot_row)  # the expert of a slot is the number of experts that end at or before its row
    ids.copy_(torch.searchsorted(p.offsets[1:].contiguous(), p.slot_row.flatten(), right=True).view_as(ids))
    leaves = [leaf.detach().requires_grad_() for leaf in (p.x, p.w_gate_up, p.w_down, p.weights)]
    times = {}
    for name, backend in (("triton", with_triton), ("torch", with_torch)):
        forward = lambda b=backend: b.moe_mlp(leaves[0], leaves[1], leaves[2], ids, leaves[3])  # noqa: E731
        both = lambda f=forward: torch.autograd.grad(f(), leaves, p.grad)  # noqa: E731
        with configs.override(choices if name == "triton" else {}):
            both()
            times[f"{name} forward"] = 1e3 * triton.testing.do_bench(forward, warmup=10, rep=60, return_mode="median")
            times[f"{name} forward+backward"] = 1e3 * triton.testing.do_bench(both, warmup=10, rep=60, return_mode="median")
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--tokens", default="16384,4096,65536")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--compile-limit", type=float, default=150.0, help="seconds for the parallel compilation")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune.py needs a CUDA device")
        return 1
    shapes = [(int(tokens), routing) for tokens in args.tokens.split(",") for routing in ROUTINGS]
    todo = jobs(args.ops.split(","))
    name, versions = torch.cuda.get_device_name(), {"torch": torch.__version__, "triton": __import__("triton").__version__}
    started = time.monotonic()
    failures = compile_all(todo, args.workers, args.compile_limit)
    print(
        f"{name} {versions}: {len(todo)} candidates, {len(failures)} failed to compile, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    for job, wrong in failures.items():
        print(f"  {job.op:8s} {job.config}: {wrong}", flush=True)
    columns = "  ".join(f"{tokens // 1024}k {routing:8s}" for tokens, routing in shapes)
    print(f"microseconds (TFLOP/s)  {columns}", flush=True)
    best: dict[str, tuple[float, Config]] = {}
    with open(args.output, "w") as file:
        for job, rows, wrong in measure_all([job for job in todo if job not in failures], shapes):
            record = {"op": job.op, "config": asdict(job.config), "gpu": name, **versions, "rows": rows, "failure": wrong}
            file.write(json.dumps(record) + "\n")
            file.flush()
            cells = "  ".join(f"{row['p50_us']:7.1f} ({row['tflops']:3.0f})" for row in rows) or f"FAILED {wrong}"
            print(f"{job.op:8s} {job.config!s:45s} {cells}", flush=True)
            if rows:
                score = statistics.geometric_mean(row["p50_us"] / row["tokens"] for row in rows)
                best[job.op] = min(best.get(job.op, (score, job.config)), (score, job.config), key=lambda pair: pair[0])
        choices = {op: config for op, (_, config) in best.items()}
        for op, config in choices.items():
            print(f"best {op:8s} {config!r}", flush=True)
        if set(choices) == set(OPS):
            for tokens, routing in shapes:
                times = whole_op(choices, tokens, routing)
                file.write(
                    json.dumps({"op": "moe_mlp", "tokens": tokens, "routing": routing, "gpu": name, **versions, **times}) + "\n"
                )
                tflops = 18 * K * D * F * tokens / times["triton forward+backward"] / 1e6
                print(f"moe_mlp {tokens} {routing}: " + ", ".join(f"{k} {v:.0f} us" for k, v in times.items()), end="")
                print(f"; {tflops:.0f} TFLOP/s forward+backward", flush=True)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
