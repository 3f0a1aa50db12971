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

from moe_train.faults.watchdog import Watchdog, log_of
from moe_train.parallel.mesh import World
from moe_train.parallel.watch import Watch
from moe_train.patience import within
from moe_train.train import Trainer

ALONE = World(0, 1, torch.device("cpu"), torch.float32, "a test")
LIMIT = 1.0


class SlowRows:
    """As many micro-batches, each of which takes so long."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds = count, seconds

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            time.sleep(self.seconds)
            yield number


@pytest.mark.parametrize(("count", "seconds", "speaks"), [(7, 0.3, False), (1, 2.1, True)])
def test_an_evaluation_that_goes_on_does_not_hang(count: int, seconds: float, speaks: bool, tmp_path: Path) -> None:
    """Both evaluations take twice the limit."""
    taken: list[Any] = []
    feed = SimpleNamespace(judge=lambda engine, rows: taken.extend(rows))
    trainer: Any = SimpleNamespace(feed=feed, engine=None, log=None)
    with Watchdog(tmp_path, ALONE, Watch(ALONE, 60.0), LIMIT) as watchdog:
        Trainer._evaluate(trainer, 1, "valid", SlowRows(count, seconds), watchdog)
        log = log_of(tmp_path, 0).read_text()
    assert taken == list(range(count))
    assert ("nothing has ended for" in log) == speaks


def test_signs_go_on_while_another_thread_waits_for_the_store() -> None:
    """On one connection they would come when the wait has ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    waits = threading.Thread(target=lambda: within(60.0, lambda: store.wait(["never"], timedelta(seconds=4))))
    with Watch(replace(ALONE, size=2), 60.0) as watch:
        waits.start()
        time.sleep(0.2)
        start = time.monotonic()
        (sign,) = watch.everyone()  # rank 1 has not come
        seconds = time.monotonic() - start
    assert sign.startswith("rank 0: running")
    assert seconds < 2.0
    waits.join()
