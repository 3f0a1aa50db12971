"""Saving while training goes on: a copy of the state is made, and a thread writes it.

Training stands still for the copy alone. The thread has a process group of its own over gloo, so that its collectives never mix with
those of training, and one save is in flight at most: the next one waits for it. What the thread does is `dcp.save`, so that the
folder gets its name when the files of all ranks are written and synced, and a crash at any moment leaves the checkpoint before.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from moe_train.checkpoint import dcp

log = logging.getLogger(__name__)


class Job(threading.Thread):
    """A save in flight. A daemon: a run that ends with an error must not wait for ranks that are lost."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        super().__init__(name=f"save-{step}", daemon=True)
        self.step, self.write = step, write
        self.error: BaseException | None = None

    def run(self) -> None:
        """Write, and keep what is raised."""
        try:
            self.write()
        except BaseException as error:
            self.error = error


class Saver:
    """Context manager that saves into `folder` on all ranks together and keeps the newest `last` and those that `every` divides.

    On leaving it waits for the save in flight, but not after an error in `lost`, which says that ranks are gone, or KeyboardInterrupt.
    """

    def __init__(
        self,
        folder: Path,
        *,
        asynchronous: bool,
        last: int,
        every: int,
        device: torch.device,
        timeout_seconds: float,
        lost: type[Exception],
    ) -> None:
        self.folder, self.asynchronous, self.last, self.every = folder, asynchronous, last, every
        self.device, self.lost = device, lost
        self._timeout = timedelta(seconds=timeout_seconds)
        self._pinned = device.type == "cuda"
        # Not DefaultStager around it: torch 2.11's lets go of the memory after each copy, and cannot copy a second time.
        self._stager = StateDictStager(pin_memory=self._pinned, share_memory=False)
        self._group: dcp.Group = None
        self._job: Job | None = None

    def __enter__(self) -> Self:
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._job is not None and (error is None or (isinstance(error, Exception) and not isinstance(error, self.lost))):
            self._job.join()
            if self._job.error is not None and dist.get_rank() == 0:
                log.warning("warning: %s", self._job.error)
        if error is None:
            self._stager.close()
            dist.destroy_process_group(self._group)

    @property
    def done(self) -> bool:
        """Whether a save has ended on this rank that `wait` was not called for."""
        return self._job is not None and not self._job.is_alive()

    def wait(self) -> dcp.NotSaved | None:
        """Wait for the save in flight, if there is one. Returns the disk's refusal, the same on all ranks; other errors are raised."""
        job, self._job = self._job, None
        if job is None:
            return None
        job.join()
        if job.error is None or isinstance(job.error, dcp.NotSaved):
            return job.error
        raise job.error

    def start(
        self,
        step: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        files: dict[str, bytes],
        expected: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin to save (arguments: `dcp.save`); `tensors` may change when this returns. The save before must have been waited for."""
        assert self._job is None
        if self.asynchronous:
            tensors = self._copy(tensors)

        def write() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins with the first one
            dcp.save(self.folder, step, tensors, state, files, expected, self._group)
            self._delete_old()

        self._job = Job(step, write)
        self._job.start()
        if not self.asynchronous:
            self._job.join()

    def _copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors in the host's memory, which is allocated for the first copy and used again."""
        copied = cast(dict[str, Any], self._stager.stage(tensors, non_blocking=self._pinned))
        if self._pinned:
            torch.cuda.synchronize(self.device)
        return copied

    def _delete_old(self) -> None:
        try:
            dcp.on_main(lambda: dcp.keep(self.folder, self.last, self.every), self._group)
        except OSError as error:
            if dist.get_rank() == 0:
                log.warning("warning: %s: old checkpoints cannot be deleted: %s", self.folder, error)
