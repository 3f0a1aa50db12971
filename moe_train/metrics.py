"""What a run records: metrics.jsonl, boards, log.txt, router health and throughput.

metrics.jsonl has one JSON object per line, in the order in which things happened:

    training row     kind "train", step, loss (cross entropy plus weighted router losses), and what else the trainer gives
    evaluation row   kind "eval", step, split, loss (nats per target token), bits_per_byte, perplexity, ...; of a classifier accuracy,
                     examples and classes: name -> examples, correct, predicted
    fault row        kind "fault", step, cause, action, text, bundle: what was wrong with a step (moe_train.faults)

Names in a training row beside `loss`, each there where it applies:

    cross_entropy            nats per target token: what compares with an evaluation's loss
    lr, grad_norm            learning rate; global gradient norm before clipping
    tokens_per_second        over all ranks, since the row before, without pauses for validation and checkpoints
    step_seconds             mean duration of these steps
    slowest_rank             the rank that works longest, without what it waits for others (several ranks on CPU)
    slowest_seconds          its work in a step
    others_seconds           the median of the others' work
    skipped                  1 where the step changed no weight
    mfu, mfu_full            share of the matmul rate that was used, attention counted causally and in full (moe_train.flops)
    load_max_mean            load of the fullest expert / mean load: 1 is even, E / top_k is collapse; the worst layer
    entropy_min              mean entropy of the router's scores per token, nats; the lowest layer
    dead_experts             experts that no token chose in this step; the sum over layers
    code_entropy             entropy of how often each code of a quantising router was chosen, nats; the lowest layer
    balance_loss, z_loss     mean per token, unweighted; mean over layers
    layers                   by layer name: tokens_per_expert [E], load_max_mean, entropy, dead_experts, balance_loss, ...

Whatever else a router sums over tokens is treated as balance_loss is.

A value that is not finite is written as null, and its dotted name is listed under `nonfinite`: JSON has no NaN.

TensorBoard tags are train/<name>, <split>/<name>, and <name>/layer_03 for what `layers` holds.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moe_train.config.faults import MonitorSection
from moe_train.files import write_atomically
from moe_train.flops import Flops
from moe_train.monitor import open_boards
from moe_train.screen import Screen, describe_evaluation, without_controls

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"

Row = dict[str, Any]


def router_health(stats: Mapping[str, Mapping[str, Tensor | float]], tokens: int) -> Row:
    """Health of every layer's router, and of all layers together, from sums over a step of `tokens` real tokens.

    `stats`: layer name -> tokens_per_expert [E] and scalar sums. The module's docstring lists the names that come out. Floats
    keep six digits, because a row of a deep model is long enough.
    """
    layers = {name: _layer_health(_plain(_without_matrices(sums)), max(tokens, 1)) for name, sums in stats.items()}
    found: Row = {}
    for name in dict.fromkeys(name for layer in layers.values() for name in layer if name != "tokens_per_expert"):
        shown, over_layers = _OVER_LAYERS.get(name, (name, statistics.fmean))
        found[shown] = _six_digits(over_layers([layer[name] for layer in layers.values() if name in layer]))
    return found | {"layers": layers} if layers else {}


# Of a layer's measure: its name and value over all layers. The mean, where it is not here.
_OVER_LAYERS: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "load_max_mean": ("load_max_mean", max),
    "entropy": ("entropy_min", min),
    "dead_experts": ("dead_experts", sum),
    "code_entropy": ("code_entropy", min),
}


def _without_matrices(sums: Mapping[str, Any]) -> Row:
    """What a router keeps for its own update is no measure, and long."""
    return {name: value for name, value in sums.items() if getattr(value, "ndim", 0) < 2}


def _layer_health(sums: Row, tokens: int) -> Row:
    loads = sums["tokens_per_expert"]
    health = {
        "tokens_per_expert": loads,
        "load_max_mean": _six_digits(max(loads) * len(loads) / sum(loads)) if any(loads) else 0.0,
        "dead_experts": loads.count(0),
    }
    if codes := sums.get("tokens_per_code"):
        health["code_entropy"] = _six_digits(-sum(n / sum(codes) * math.log(n / sum(codes)) for n in codes if n))
    return health | {name: _six_digits(value / tokens) for name, value in sums.items() if not isinstance(value, list)}


def _six_digits(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


class Throughput:
    """Tokens per second and MFU, without the time spent in `pause()`. Call `step` when the device has finished the step."""

    def __init__(self, flops: Flops, rate: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`rate`: matmul FLOP/s of all ranks together."""
        self.flops, self.rate, self.clock = flops, rate, clock
        self.mark = clock()  # end of the step before, moved on by pauses
        self.interval = (0, 0, 0.0)  # steps, tokens, seconds since the row before
        self.counted = (0, 0, 0.0)  # the same since the first step, which compiles and allocates and is left out
        self.first = True

    def step(self, tokens: int) -> None:
        """A step of `tokens` tokens over all ranks has ended."""
        now = self.clock()
        seconds, self.mark = now - self.mark, now
        self.interval = _add(self.interval, tokens, seconds)
        if not self.first:
            self.counted = _add(self.counted, tokens, seconds)
        self.first = False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is not training: validation, checkpoints, plots."""
        start = self.clock()
        try:
            yield
        finally:
            self.mark += self.clock() - start

    def row(self) -> Row:
        """tokens_per_second, step_seconds, mfu and mfu_full since the last call; empty where no step ended."""
        interval, self.interval = self.interval, (0, 0, 0.0)
        return self._rates(interval)

    def average(self) -> Row:
        """The same over all steps but the first; empty where there was only that one."""
        return self._rates(self.counted)

    def _rates(self, interval: tuple[int, int, float]) -> Row:
        steps, tokens, seconds = interval
        if not steps or seconds <= 0:
            return {}
        speed = tokens / seconds
        mfu, full = (speed * cost / self.rate for cost in (self.flops.causal, self.flops.full))
        return {"tokens_per_second": speed, "step_seconds": seconds / steps, "mfu": mfu, "mfu_full": full}


def _add(interval: tuple[int, int, float], tokens: int, seconds: float) -> tuple[int, int, float]:
    return interval[0] + 1, interval[1] + tokens, interval[2] + seconds


class RunLog:
    """The one place where a run reports. Only rank 0 has one; a context manager.

    A run that resumes after `start_step` drops the rows of later steps, which it is going to repeat, so that each step stands
    in metrics.jsonl once. For none to be missing, log a step and its validation before its checkpoint: train, evaluation, sync,
    save. `start_step` 0 begins a new file.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        live: bool | None = None,
        monitor: MonitorSection = MonitorSection(),  # noqa: B008 it is frozen
    ) -> None:
        """`live`: a progress line that is redrawn in place, or plain lines; by default whatever suits stdout."""
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = _Rows(folder / METRICS_FILE, start_step)
        self.boards = open_boards(monitor, folder, start_step)
        self.text = (folder / LOG_FILE).open("a", encoding="utf-8")
        self.screen = Screen(total_steps, live)
        if self.rows.dropped:
            self.say(f"{METRICS_FILE}: dropped {self.rows.dropped} line(s) that are torn or later than step {start_step}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def train(self, step: int, row: Row) -> None:
        """Record and show what step `step` gave; `row` has `loss`."""
        row = _plain(row)
        self.rows.append({"kind": "train", "step": step, **row})
        self._to_boards("train", step, row)
        self.screen.train(step, row)
        self._write(self.screen.line(step, row))

    def evaluation(self, step: int, split: str, row: Row) -> None:
        """Record and show an evaluation after step `step`. One that is there already, from before a restart, is replaced."""
        row = _plain(row)
        self.rows.replace_evaluation(step, split)
        self.rows.append({"kind": "eval", "step": step, "split": split, **row})
        self._to_boards(split, step, row)
        self.say("  ".join([f"step {step}", split, *describe_evaluation(row)]))

    def fault(self, step: int, row: Row) -> None:
        """Record and show what was wrong with step `step`; `row` has cause, action, text and bundle."""
        self.rows.append({"kind": "fault", "step": step, **row})
        used = {"warn": "", "again": "; the step is computed again"}.get(row["action"], "; the step is skipped")
        kept = f"; kept in {row['bundle']}" if row.get("bundle") else ""
        self.say(f"warning: step {step}: {row['text']}{used}{kept}")

    def tick(self, step: int) -> None:
        """Move the live line on after a step that has no row."""
        self.screen.tick(step)

    def say(self, text: str) -> None:
        """Print a message, above the live line where there is one."""
        self.screen.say(text)
        self._write(text)

    def sync(self) -> None:
        """Make the rows durable; call it before a checkpoint that presumes them is saved."""
        self.rows.sync()
        for board in self.boards:
            board.flush()

    def close(self) -> None:
        """Stop the live line and close the files."""
        self.screen.close()
        self.rows.close()
        self.text.close()
        for board in self.boards:
            board.close()

    def _to_boards(self, prefix: str, step: int, row: Row) -> None:
        scalars = list(_scalars(prefix, row))
        for board in self.boards:
            board.add(scalars, step)

    def _write(self, text: str) -> None:
        """A line of log.txt, which is kept over restarts."""
        self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {without_controls(text)}\n")
        self.text.flush()


def _scalars(prefix: str, row: Row) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, int | float):
            yield f"{prefix}/{name}", value
    for layer, health in row.get("layers", {}).items():
        for name, value in health.items():
            if isinstance(value, int | float):
                yield f"{name}/layer_{layer:0>2}", value


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl, without lines that are torn; empty where there is none."""
    with contextlib.suppress(FileNotFoundError):
        rows = (_parse(line) for line in (folder / METRICS_FILE).read_bytes().splitlines())
        return [row for row in rows if row is not None]
    return []


class _Rows:
    """metrics.jsonl: kept up to a step, then appended to line by line."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        self.dropped = self._keep(lambda row: bool(start_step) and row["step"] <= start_step)
        self.evaluated = {(row["step"], row.get("split")) for row in read_rows(path.parent) if row.get("kind") == "eval"}
        self.file = path.open("ab")

    def append(self, row: Row) -> None:
        """Write one line and hand it to the operating system, so that it outlives this process."""
        nonfinite: list[str] = []
        row = _without_nonfinite(row, "", nonfinite)
        if nonfinite:
            row["nonfinite"] = nonfinite
        self.file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.file.flush()

    def replace_evaluation(self, step: int, split: str) -> None:
        """Drop the evaluation of this step and split, if there is one, and expect another."""
        if (step, split) in self.evaluated:
            self.file.close()
            self._keep(lambda row: (row.get("kind"), row["step"], row.get("split")) != ("eval", step, split))
            self.file = self.path.open("ab")
        self.evaluated.add((step, split))

    def sync(self) -> None:
        """Wait until the disk has the rows."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _keep(self, wanted: Callable[[Row], bool]) -> int:
        """Rewrite the file with the rows that are `wanted`, byte for byte; returns how many lines went."""
        if not self.path.exists():
            return 0
        before = self.path.read_bytes()
        lines = before.splitlines()
        kept = [line for line in lines if (row := _parse(line)) is not None and wanted(row)]
        after = b"".join(line + b"\n" for line in kept)
        if after != before:
            write_atomically(self.path, after)
        return len(lines) - len(kept)


def _parse(line: bytes) -> Row | None:
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _plain(value: Any) -> Any:
    """Tensors and numpy values as Python numbers and lists, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _without_nonfinite(value: Any, name: str, found: list[str]) -> Any:
    """The same with null for NaN and infinities, whose dotted names go to `found`."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{name}.{key}".lstrip("."), found) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item, f"{name}.{i}", found) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found.append(name)
        return None
    return value
