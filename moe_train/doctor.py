"""Is this machine, this data and this config fit for a run? Each check says what it found, and what to do where that is wrong.

Ranks of torchrun check together: versions that differ, a slow device, a slow link and clocks that disagree are seen only then.
"""

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_kernels import get_backend
from moe_train.cli import load_run, parse
from moe_train.config import Config
from moe_train.data.stream import TokenStream
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.files import cannot_write, temporary_beside
from moe_train.flops import measured_matmul_rate
from moe_train.model.decoder import Decoder
from moe_train.parallel.mesh import World, start_world
from moe_train.pretraining import settle_vocabulary

OLDEST = {"torch": (2, 11), "numpy": (1, 26), "pydantic": (2, 10), "safetensors": (0, 5), "sentencepiece": (0, 2)}
PROBE_BYTES = 64 << 20  # written to the disk, and reduced on CUDA (a quarter of it on CPU)
SLOWEST_DISK = 20e6  # bytes a second
SLOWEST_SHARE = 0.7  # of the median rank's rate
SLOWEST_LINK = 5e9  # bytes a second between GPUs: PCIe and InfiniBand are faster, plain sockets are not
LARGEST_SKEW = 1.0  # seconds between the ranks' clocks
STATE_BYTES = 12  # of a parameter in a checkpoint: fp32 and two moments
SAMPLES = 64  # places of a dataset that are read
SAMPLE_TOKENS = 4096


class Check(NamedTuple):
    """One finding. `remedy` is empty where there is nothing to do."""

    name: str
    good: bool
    found: str
    remedy: str = ""


Checks = Iterator[Check]


def examine(path: Path | None, overrides: list[str], whole_data: bool) -> Checks:
    """All checks, as they are made; on all ranks, which call this together and get the same. `path`: a run file."""
    yield from _versions()
    config, check = _read_config(path, overrides)
    yield check
    if config is None:
        return
    try:
        world = start_world(config)
    except UserError as error:
        yield Check("layout", False, _line(error), "change the axes, or --nproc-per-node")
        return
    yield Check("layout", True, world.reason)
    yield from _peers(world)
    yield from _devices(world)
    yield from _speed(world)
    yield from _links(world)
    folder = Path(config.run.dir or "runs")
    yield from _shared(world, lambda: _disk(folder))
    if path is not None:
        yield from _shared(world, lambda: _model_and_data(config, folder, whole_data))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _versions() -> Checks:
    python = platform.python_version()
    yield Check("python", _numbers(python) >= (3, 11), python, "use Python 3.11 or newer")
    for name, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", f"pip install '{name}>={wanted}'")
            continue
        yield Check(name, _numbers(version) >= oldest, version, f"pip install '{name}>={wanted}'")


def _read_config(path: Path | None, overrides: list[str]) -> tuple[Config | None, Check]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if path is None:
            none = {"train": {"micro_batch_size": 1, "global_batch_size": size}}
            return parse(none, "doctor"), Check("config", True, "none given: data and model are not checked")
        return load_run(path, overrides), Check("config", True, f"{path} is valid")
    except UserError as error:
        return None, Check("config", False, _line(error), "correct the keys that are named")


def _peers(world: World) -> Checks:
    """What has to be the same everywhere."""
    mine = (platform.python_version(), torch.__version__, metadata.version("numpy"))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    others = {rank: theirs for rank, theirs in enumerate(everyone) if theirs != everyone[0]}
    text = f"{world.size} rank(s) have Python, torch, numpy {', '.join(everyone[0])}"
    if others:
        text = f"rank 0 has {everyone[0]}, " + ", ".join(f"rank {rank} {theirs}" for rank, theirs in others.items())
    yield Check("same versions", not others, text, "install the same versions on all nodes")


def _devices(world: World) -> Checks:
    """What each rank finds of its own device: the first that is wrong, or rank 0's."""
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, list(_own_device(world)))
    for checks in zip(*everyone, strict=True):
        rank = next((rank for rank, check in enumerate(checks) if not check.good), 0)
        yield checks[rank]._replace(found=f"{checks[rank].found} (rank {rank})" if rank else checks[rank].found)


def _own_device(world: World) -> Checks:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cpu":
        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        text = f"no CUDA device is used; {cores} cores for {local} rank(s) of {threads} thread(s)"
        yield Check(
            "devices", local * threads <= cores, text, f"set OMP_NUM_THREADS={max(1, cores // local)}, or start fewer ranks"
        )
        return
    free, total = torch.cuda.mem_get_info(world.device)
    text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(world.device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    yield Check("devices", free > 0.8 * total, text, "another process uses the GPU: nvidia-smi names it")
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits", f"--id={world.device.index}"]
    try:
        now, most = map(float, subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split(","))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        yield Check("gpu clock", True, f"not known: {_line(error)}")
        return
    yield Check("gpu clock", True, f"{now:.0f} MHz now, {most:.0f} MHz at most; idle GPUs are slower than busy ones")


def _speed(world: World) -> Checks:
    """A matmul on each rank: a device that is hot, or shared with somebody, is slower than the others."""
    rates = _gather(world, measured_matmul_rate(world.device, world.dtype))
    median, slowest = statistics.median(rates), min(range(world.size), key=rates.__getitem__)
    text = f"{median / 1e12:.3g} TFLOP/s a rank, the slowest (rank {slowest}) {rates[slowest] / 1e12:.3g}"
    remedy = "look at that device's temperature, clocks and other processes"
    yield Check("matmul", rates[slowest] >= SLOWEST_SHARE * median, text, remedy)


def _links(world: World) -> Checks:
    """All-reduce of fp32, and whether clocks agree, by which logs of several nodes are compared."""
    if world.size == 1:
        yield Check("all-reduce", True, "one rank: not measured; start with torchrun")
        return
    count = PROBE_BYTES // (4 if world.device.type == "cuda" else 16)
    seconds = []
    for _ in range(4):  # the first connects
        values = torch.full((count,), float(world.rank + 1), device=world.device)
        _wait(world)
        start = time.perf_counter()
        dist.all_reduce(values)
        _wait(world)
        seconds.append(time.perf_counter() - start)
    right = all(_gather(world, float((values == world.size * (world.size + 1) / 2).all())))
    speed = min(_gather(world, 2 * (world.size - 1) / world.size * values.nbytes / min(seconds[1:])))
    text = f"{speed / 1e9:.2f} GB/s bus bandwidth for {values.nbytes >> 20} MiB on {world.size} ranks"
    yield judge_links(right, speed, text, gpus=world.device.type == "cuda")
    _wait(world)
    times = _gather(world, time.time())
    skew = max(times) - min(times)
    yield Check("clocks", skew < LARGEST_SKEW, f"the ranks' clocks are within {skew:.3f} s", "synchronise them (chrony, ntpd)")


def judge_links(right: bool, speed: float, text: str, gpus: bool) -> Check:
    """What an all-reduce shows that gave the right sum or not, at `speed`; of CPUs any speed is taken."""
    if not right:
        return Check(
            "all-reduce", False, f"{text}, WRONG SUM", "a link or device corrupts data: find it by fewer ranks at a time"
        )
    remedy = (
        "NCCL_DEBUG=INFO shows which transport was chosen, and launch/slurm/nccl.env how to choose; plain sockets are too slow"
    )
    return Check("all-reduce", not gpus or speed >= SLOWEST_LINK, text, remedy)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    dist.barrier()


def _gather(world: World, value: float) -> list[float]:
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, value)
    return everyone


def _shared(world: World, checks: Callable[[], Checks]) -> Checks:
    """Checks of what all ranks share, made on rank 0."""
    found: list[Any] = [list(checks()) if world.main else None]
    dist.broadcast_object_list(found)
    yield from found[0]


def _disk(folder: Path) -> Checks:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        speed = _write_speed(there)
    except OSError as error:
        yield Check("disk", False, _line(cannot_write(there, error)), "choose another run.dir")
        return
    text = f"{there}: {speed / 1e6:.0f} MB/s written and synced, {shutil.disk_usage(there).free / 1e9:.1f} GB free"
    yield Check("disk", speed > SLOWEST_DISK, text, "checkpoints will take long: choose another disk for run.dir")


def _write_speed(folder: Path) -> float:
    """Bytes a second of a file that is written, synced, read back and deleted. Raises OSError."""
    path, block = temporary_beside(folder / "doctor"), os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        with path.open("rb") as file:
            if any(piece != block for piece in iter(lambda: file.read(len(block)), b"")):
                raise OSError(f"{path} does not read back as it was written")
        return PROBE_BYTES / seconds
    finally:
        path.unlink(missing_ok=True)


def _model_and_data(config: Config, folder: Path, whole: bool) -> Checks:
    try:
        config, tokenizer = settle_vocabulary(config)
    except UserError as error:
        yield Check("tokenizer", False, _line(error), "correct data.tokenizer")
        return
    yield Check("tokenizer", True, f"{config.data.tokenizer}, {tokenizer.vocab_size} ids")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(config.model, get_backend("reference", torch.device("cpu"))).parameters())
    size, kept = STATE_BYTES * parameters, config.checkpoint.keep_last + 1
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    room = shutil.disk_usage(there).free
    text = f"{parameters / 1e6:.1f} M parameters: {kept} checkpoints of {size / 1e9:.3f} GB beside {room / 1e9:.1f} GB free"
    yield Check(
        "room for checkpoints", kept * size < room, text, "make room, lower checkpoint.keep_last, or choose another run.dir"
    )
    for split in ("train", "valid", "test"):
        yield _dataset(config, tokenizer, split, whole)


def _dataset(config: Config, tokenizer: Tokenizer, split: str, whole: bool) -> Check:
    prefixes = getattr(config.data, split)
    if prefixes is None:
        return Check(f"data.{split}", True, "not given: the default corpus, which the first run makes")
    try:
        stream = TokenStream(prefixes, config.model.vocab_size, tokenizer)
        count, length = stream.num_tokens, min(SAMPLE_TOKENS, stream.num_tokens)
        last = count - length
        starts = range(0, count, length) if whole else sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
        for start in starts:
            stream.read(start, min(start + length, count))
    except UserError as error:
        return Check(f"data.{split}", False, _line(error), "prepare it again with launch/prepare_data.py")
    read = "every token" if whole else f"{len(starts)} places of {length} tokens"
    return Check(f"data.{split}", True, f"{count} tokens in {len(stream.datasets)} dataset(s); {read} read")
