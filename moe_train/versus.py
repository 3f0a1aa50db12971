"""Several sides of a benchmark in one run: each trains in a process of its own, and they take turns of one optimizer step.

Turns of a step, since a shared machine's speed changes from minute to minute: what slows one side down then slows the others down
too, and the ratios inside a round stay comparable. A process each, since only the peak of a whole process can be read.
"""

import multiprocessing
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.benchmark import Meter, quantile
from moe_train.cli import load_run
from moe_train.errors import UserError


class Side(NamedTuple):
    """What one process trains."""

    name: str
    config: Path
    overrides: list[str]
    rival: str | None = None


def compare(sides: list[Side], rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Time `rounds` steps of each side in turns, after `warmup` ones each; a row per side.

    The rows after the first hold the first side's speed over theirs: `ratio`, the median over the rounds, with its quantiles;
    `processor_ratio`, their processor time over the first side's, which other programs disturb less; and `memory_ratio`, the first
    side's peak over theirs. `load_average` and `stolen` (the share of processor time that the host kept to itself) say how quiet
    the machine was.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sides are compared on one rank each: start with python, or torchrun --nproc-per-node=1")
    with _started(sides) as connections:
        for connection in connections:
            for _ in range(warmup):
                _ask(connection, "step")
            _ask(connection, "forget")
        before = _ticks()
        speeds = [[_ask(connection, "step") for connection in connections] for _ in range(rounds)]
        noise = {"load_average": os.getloadavg()[0], "stolen": _stolen(before)}
        rows = [_ask(connection, "row") for connection in connections]
    for side, row in zip(sides, rows, strict=True):
        row |= {"side": side.name, "config": str(side.config), "overrides": side.overrides, **noise}
    for i, row in enumerate(rows[1:], 1):
        row |= _against([turns[0] / turns[i] for turns in speeds], rows[0], row)
    return rows


def describe(row: dict[str, Any]) -> str:
    """The ratios of a side for people."""
    return (
        f"{row['ratio_of']} / {row['side']}: speed {row['ratio']:.3f} (p20 {row['ratio_p20']:.3f}, p80 {row['ratio_p80']:.3f}; by "
        f"processor time {row['processor_ratio']:.3f}), peak memory {row['memory_ratio']:.3f}; load average "
        f"{row['load_average']:.1f}, {row['stolen']:.0%} of the processors stolen by the host"
    )


def _against(ratios: list[float], first: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {
        "ratio_of": first["side"],
        "ratio": statistics.median(ratios),
        "ratio_p20": quantile(ratios, 0.2),
        "ratio_p80": quantile(ratios, 0.8),
        "processor_ratio": row["processor_seconds_per_step"] / first["processor_seconds_per_step"],
        "memory_ratio": first["peak_memory_bytes"] / row["peak_memory_bytes"],
    }


@contextmanager
def _started(sides: list[Side]) -> Iterator[list[Connection]]:
    """A connection to each side's process, in which the model is built."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for side in sides:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, side), daemon=True)
            process.start()
            there.close()
            connections.append(here)
            processes.append(process)
            _answer(here)
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(connection: Connection, side: Side) -> None:
    """A side's process: build, then answer the names of Meter's methods with what they return."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torchrun's; each side is a world of its own
        os.environ.pop(name, None)
    try:
        meter = Meter(load_run(side.config, side.overrides), side.rival)
    except UserError as error:
        connection.send(error)
        return
    connection.send(None)
    while True:
        connection.send(getattr(meter, connection.recv())())


def _ask(connection: Connection, method: str) -> Any:
    connection.send(method)
    return _answer(connection)


def _answer(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError("a side of the benchmark ended before its work was done; what it printed is above") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _ticks() -> list[int]:
    stat = Path("/proc/stat")  # Linux: user nice system idle iowait irq softirq steal, of all processors
    return [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else [0] * 8


def _stolen(before: list[int]) -> float:
    passed = [b - a for a, b in zip(before, _ticks(), strict=True)]
    return passed[-1] / max(sum(passed), 1)
