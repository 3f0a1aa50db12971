"""The watchdog of hangs, silent while an evaluation goes on, however long; and the signs that ranks give each other."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_train.faults import watchdog as watchdog_module
from moe_train.faults.watchdog import Watchdog, log_of
from moe_train.parallel.mesh import World
from moe_train.parallel.watch import Watch
from moe_train.patience import within
from moe_train.train import Trainer

ALONE = World(0, 1, torch.device("cpu"), torch.float32, "a test")
LIMIT = 0.2
PATIENCE = 60.0
SPOKEN = "nothing has ended for"


class Clock:
    """The watchdog's own time, which passes where a test says so: a machine that stands still for a while changes nothing."""

    def __init__(self) -> None:
        self.now = 1.0
        self.asked = threading.Semaphore(0)

    def monotonic(self) -> float:
        self.asked.release()
        return self.now

    def strftime(self, how: str) -> str:
        return how

    def rows(self, count: int, seconds: float) -> Iterator[int]:
        """As many micro-batches, each of which takes so long, and the watchdog looks, reports and looks again meanwhile."""
        for number in range(count):
            self.now += seconds
            while self.asked.acquire(blocking=False):
                pass
            assert all(self.asked.acquire(timeout=PATIENCE) for _ in range(3))
            yield number


@pytest.mark.parametrize(("count", "seconds", "speaks"), [(7, 0.3 * LIMIT, False), (1, 2.1 * LIMIT, True)])
def test_an_evaluation_that_goes_on_does_not_hang(
    count: int, seconds: float, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both evaluations take twice the limit."""
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    taken: list[Any] = []
    feed = SimpleNamespace(judge=lambda engine, rows: taken.extend(rows))
    trainer: Any = SimpleNamespace(feed=feed, engine=None, log=None)
    with Watchdog(tmp_path, ALONE, Watch(ALONE, 60.0), LIMIT) as watchdog:
        Trainer._evaluate(trainer, 1, "valid", clock.rows(count, seconds), watchdog)
        log = log_of(tmp_path, 0).read_text()
    assert taken == list(range(count))
    assert (SPOKEN in log) == speaks


def test_signs_go_on_while_another_thread_waits_for_the_store() -> None:
    """On one connection they would come when the wait has ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    waits = threading.Thread(target=lambda: within(PATIENCE, lambda: store.wait(["at last"], timedelta(seconds=PATIENCE))))
    with Watch(replace(ALONE, size=2), 60.0) as watch:
        waits.start()
        time.sleep(0.2)
        (sign,) = watch.everyone()  # it gives up after some seconds; rank 1 has not come
        assert waits.is_alive()
    assert sign.startswith("rank 0: running")
    store.clone().set("at last", "")
    waits.join()
