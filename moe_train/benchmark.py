"""How fast a run trains on this machine: tokens per second with their spread, where the time goes, peak memory and MFU."""

import json
import platform
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe_train.config import Config
from moe_train.data.loader import Loader, MicroBatch, StepBatch
from moe_train.engine.base import StepResult
from moe_train.engine.choose import make_engine
from moe_train.engine.native import NativeEngine
from moe_train.flops import count_flops, matmul_rate
from moe_train.metrics import router_health
from moe_train.parallel.mesh import World, start_world
from moe_train.parallel.traffic import Traffic
from moe_train.pretraining import data_loader, settle_vocabulary
from moe_train.rivals import Steps, load_rival


class RandomRows:
    """Batches of random tokens for a run without data: whole rows of one document, Zipf-distributed as words are."""

    def __init__(self, config: Config, world: World) -> None:
        assert config.model.vocab_size is not None
        self.config, self.world = config, world
        self.weights = 1.0 / torch.arange(1.0, config.model.vocab_size + 1)
        self.generator = torch.Generator().manual_seed(world.rank)

    def next_step(self) -> StepBatch:
        """This rank's micro-batches of a step."""
        train = self.config.train
        count = train.global_batch_size // (train.micro_batch_size * self.world.size)
        tokens = train.global_batch_size * train.seq_len
        return StepBatch([self._micro() for _ in range(count)], tokens, tokens)

    def _micro(self) -> MicroBatch:
        train = self.config.train
        shape = (train.micro_batch_size, train.seq_len)
        drawn = torch.multinomial(self.weights, shape[0] * (shape[1] + 1), replacement=True, generator=self.generator)
        drawn = drawn.view(shape[0], shape[1] + 1)
        zeros = torch.zeros(shape, dtype=torch.long)
        positions = torch.arange(shape[1]).expand(shape)
        return MicroBatch(drawn[:, :-1], drawn[:, 1:], positions, zeros, zeros, torch.arange(shape[0]))


class Split:
    """Seconds by part of a step. The device is waited for at each mark, so that a part holds its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, defaultdict[str, float](float), 0.0

    def mark(self, part: str) -> None:
        """What ran since the last mark was `part`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


class Meter:
    """Times optimizer steps of a run, or of the `rival` (see `moe_train.rivals`) that has its shapes."""

    def __init__(self, config: Config, rival: str | None = None) -> None:
        self.rival, self.world = rival, start_world(config)
        self.config, tokenizer = settle_vocabulary(config)
        make, self.versions = load_rival(rival) if rival else (make_engine, {})
        self.memory_before = _peak_memory(self.world.device)
        self.engine: Steps = make(self.config, self.world)
        self.loader: Loader | RandomRows = (
            data_loader(self.config, self.world, tokenizer) if config.data.train else RandomRows(self.config, self.world)
        )
        self.forget()

    def forget(self) -> None:
        """What was timed until now was warm-up."""
        self.split, self.rates, self.processor_seconds = Split(self.world.device), list[float](), 0.0
        self.results = list[object]()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.world.device)

    def step(self) -> float:
        """Time one optimizer step; its tokens per second over all ranks."""
        start = self.split.last = time.perf_counter()
        processor = time.process_time()
        batch = self.loader.next_step()
        self.split.mark("data")
        result = self.engine.forward_backward(batch, self.split.mark)
        self.engine.step()
        self.split.mark("optimizer")
        self.results.append(result)
        self.processor_seconds += time.process_time() - processor
        self.rates.append(batch.token_count / (self.split.last - start))
        return self.rates[-1]

    def row(self) -> dict[str, Any]:
        """The figures of all steps timed; the same on every rank but for its own memory and processor time."""
        config, world, steps = self.config, self.world, len(self.rates)
        flops = count_flops(config.model, config.train.seq_len)
        rate = matmul_rate(world.device, world.dtype)
        speed = statistics.median(self.rates)
        return {
            "rival": self.rival,
            "tokens_per_second": speed,
            "tokens_per_second_p20": quantile(self.rates, 0.2),
            "tokens_per_second_p80": quantile(self.rates, 0.8),
            "mfu_causal": speed * flops.causal / (rate.flops * world.size),
            "mfu_full": speed * flops.full / (rate.flops * world.size),
            "matmul_rate": rate.flops,
            "matmul_rate_source": rate.source,
            "seconds_per_step": {part: seconds / steps for part, seconds in self.split.seconds.items()},
            "processor_seconds_per_step": self.processor_seconds / steps,
            "peak_memory_bytes": _peak_memory(world.device),
            "memory_before_model_bytes": self.memory_before,
            "steps": steps,
            "ranks": world.size,
            "engine": config.engine.name,
            "router": config.model.router.name,
            "data": config.data.train or "random",
            "dtype": str(world.dtype)[6:],
            **self._learned(),
            **machine(world.device),
            **self.versions,
        }

    def _learned(self) -> dict[str, Any]:
        """Cross entropy in nats per target, the mean of the first tenth of the steps and of the last, and the routers' last health."""
        results = [result for result in self.results if isinstance(result, StepResult)]
        if not results:  # a rival
            return {}
        tenth = max(len(results) // 10, 1)
        first, last = (
            statistics.fmean(result.cross_entropy for result in part) for part in (results[:tenth], results[-tenth:])
        )
        train = self.config.train
        health = router_health(results[-1].stats, train.global_batch_size * train.seq_len)
        health.pop("layers", None)
        return {"cross_entropy_first": first, "cross_entropy_last": last, "health": health}

    def sent(self) -> dict[str, list[int]]:
        """Calls and bytes of what this rank sends in one more step, by axis and collective. Counting takes time: it is not timed."""
        assert isinstance(self.engine, NativeEngine)
        with Traffic(self.engine.model.layout) as traffic:
            self.engine.forward_backward(self.loader.next_step())
            self.engine.step()
        return {f"{axis} {operation}": list(sent) for (axis, operation), sent in traffic.sent().items()}


def measure(config: Config, steps: int, warmup: int) -> dict[str, Any]:
    """Time `steps` optimizer steps after `warmup` ones; on several ranks of the native engine, count what another one sends."""
    meter = Meter(config)
    for step in range(warmup + steps):
        if step == warmup:
            meter.forget()
        meter.step()
    counted = meter.world.size > 1 and config.engine.name == "native"  # DeepSpeed's groups belong to no axis
    return meter.row() | ({"sent": meter.sent()} if counted else {})


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and time of a measurement."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def append(row: dict[str, Any], path: Path) -> None:
    """Add a measurement to a data file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def describe(row: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """A measurement for people."""
    low, high = row["tokens_per_second_p20"], row["tokens_per_second_p80"]
    say(f"{row['tokens_per_second']:.0f} tokens/s (p20 {low:.0f}, p80 {high:.0f}) on {row['ranks']} rank(s) of {row['device']}")
    say(f"MFU {row['mfu_causal']:.1%} causal, {row['mfu_full']:.1%} full, against the {row['matmul_rate_source']}")
    total = sum(row["seconds_per_step"].values())
    parts = ", ".join(f"{part} {s * 1e3:.1f} ms ({s / total:.0%})" for part, s in row["seconds_per_step"].items())
    before = row["memory_before_model_bytes"] / 1e9
    say(
        f"a step: {parts}; peak memory {row['peak_memory_bytes'] / 1e9:.2f} GB a rank ({before:.2f} GB before there is a model)"
    )
    if sent := row.get("sent"):
        say(
            "a rank sends: " + ", ".join(f"{what} {size / 1e6:.2f} MB in {calls} calls" for what, (calls, size) in sent.items())
        )


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of some values, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
