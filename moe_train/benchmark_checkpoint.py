"""How fast checkpoints are written and read beside the disk itself, and how long training stands still for one.

A plain write and fsync of as many bytes takes turns with the save, and a plain read with the load, on the same folder; before anything
is read, the system is asked to forget its copy in memory.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.benchmark import Meter, machine
from moe_train.checkpoint import dcp
from moe_train.checkpoint.examine import size_of
from moe_train.checkpoint.saver import Saver
from moe_train.config import Config
from moe_train.engine.native import NativeEngine
from moe_train.parallel.watch import RankFailure

BLOCK = 16 << 20  # bytes of a plain write or read
PLAIN = "plain-rank"


class Scale:
    """Times saves and loads of a run's state under `folder`, which it leaves empty."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.meter, self.folder, self.config = Meter(config), folder, config
        self.world = self.meter.world
        assert isinstance(self.meter.engine, NativeEngine)
        self.engine = self.meter.engine
        self.block = os.urandom(BLOCK)  # zeros may cost a disk less
        dcp.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))

    def saver(self, asynchronous: bool) -> Saver:
        """Keeps one checkpoint."""
        timeout = self.config.parallel.timeout_seconds
        device = self.world.device
        return Saver(
            self.folder,
            asynchronous=asynchronous,
            last=1,
            every=0,
            device=device,
            timeout_seconds=timeout,
            lost=RankFailure,
        )

    def start(self, saver: Saver, step: int) -> None:
        """Begin a save of the state as it is."""
        saver.start(step, self.engine.state_dict(), {}, {}, self.engine.logical_state())

    def save(self, saver: Saver, step: int) -> None:
        """Save and wait."""
        self.start(saver, step)
        finish(saver)

    def load(self, step: int) -> None:
        """Read all of it into tensors of the same layout."""
        dcp.load(self.folder / f"{dcp.PREFIX}{step:08d}", self.engine.state_dict())

    def write_plainly(self, size: int) -> None:
        """This rank's part of `size` bytes."""
        left = size // self.world.size
        with self._plain.open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(self.block[:left])
            os.fsync(file.fileno())

    def read_plainly(self) -> None:
        """What `write_plainly` wrote."""
        with self._plain.open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass

    @property
    def _plain(self) -> Path:
        return self.folder / f"{PLAIN}{self.world.rank}"

    def forget(self) -> None:
        """Ask the system to drop its copies of the files from memory."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)

    def clean(self) -> None:
        """Remove what was written."""
        dist.barrier()
        self._plain.unlink(missing_ok=True)
        dcp.on_main(self._remove_checkpoints)

    def _remove_checkpoints(self) -> None:
        for path in dcp.checkpoints(self.folder):
            shutil.rmtree(path)


def finish(saver: Saver) -> None:
    """Wait for a save; the disk's refusal is raised."""
    if (refused := saver.wait()) is not None:
        raise refused


def timed(work: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def measure(config: Config, folder: Path, repeats: int, steps: int) -> dict[str, Any]:
    """Medians of `repeats` turns, then one save in the background of a run that has taken `steps` steps."""
    scale = Scale(config, folder)
    scale.meter.step()  # there are no moments before
    rates: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
    with scale.saver(asynchronous=False) as saver:
        for turn in range(1, repeats + 1):
            rates["save"].append(timed(partial(scale.save, saver, turn)))
            size = size_of(folder / f"{dcp.PREFIX}{turn:08d}")
            rates["write"].append(timed(partial(scale.write_plainly, size)))
            scale.forget()
            rates["load"].append(timed(partial(scale.load, turn)))
            scale.forget()
            rates["read"].append(timed(scale.read_plainly))
    stall = in_background(scale, steps, repeats)
    scale.clean()
    logical = scale.engine.logical_state()
    model = sum(tensor.nbytes for name, tensor in logical.items() if name.startswith("model."))
    return {
        "model_bytes": model,
        "checkpoint_bytes": size,
        **{f"{what}_bytes_per_second": size / statistics.median(seconds) for what, seconds in rates.items()},
        **{f"{what}_seconds": seconds for what, seconds in rates.items()},
        **stall,
        "ranks": scale.world.size,
        "folder": str(folder.resolve()),
        **machine(scale.world.device),
    }


def in_background(scale: Scale, steps: int, last: int) -> dict[str, float]:
    """How long a step and the copy take, and by how much the steps beside the write are longer. `last`: the step saved before."""
    usual = [timed(scale.meter.step) for _ in range(steps)]
    step = statistics.median(usual)
    with scale.saver(asynchronous=True) as saver:
        stalls: list[float] = []
        for number in (last + 1, last + 2):  # the first copy allocates its memory, later ones reuse it
            stalls.append(timed(partial(scale.start, saver, number)))
            start = time.perf_counter()
            beside: list[float] = []
            while not agreed(saver.done):
                beside.append(timed(scale.meter.step))
            finish(saver)
            written = time.perf_counter() - start
    return {
        "step_seconds": step,
        "first_stall_seconds": stalls[0],
        "stall_seconds": stalls[1],
        "stall_steps": stalls[1] / step,
        "background_seconds": written,
        "steps_beside": len(beside),
        "slowed_seconds": sum(beside) - step * len(beside),
    }


def agreed(done: bool) -> bool:
    """Whether every rank is done."""
    found = [False] * dist.get_world_size()
    dist.all_gather_object(found, done)
    return all(found)


def describe(row: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """A measurement for people."""
    size, rate = row["checkpoint_bytes"], "_bytes_per_second"
    say(
        f"a model of {row['model_bytes'] / 1e9:.2f} GB, {size / 1e9:.2f} GB with its moments, "
        f"on {row['ranks']} rank(s) of {row['device']}, under {row['folder']}"
    )
    for ours, disk, what in (("save", "write", "write and fsync"), ("load", "read", "read")):
        mine, plain = row[ours + rate], row[disk + rate]
        say(f"{ours} {mine / 1e6:.0f} MB/s, {mine / plain:.0%} of a plain {what} of the same bytes ({plain / 1e6:.0f} MB/s)")
    stall, first = row["stall_seconds"], row["first_stall_seconds"]
    say(
        f"saving in the background: training stands still for {stall:.3f} s = {row['stall_steps']:.2f} steps of "
        f"{row['step_seconds']:.3f} s (the first time {first:.3f} s)"
    )
    say(
        f"then {row['background_seconds']:.1f} s of writing beside {row['steps_beside']} steps, which take "
        f"{row['slowed_seconds']:.2f} s longer together"
    )
