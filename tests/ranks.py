"""Run a function on several real ranks over gloo and collect what each returns."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """`function(*args)` on `size` ranks in a process group; the results in rank order. A rank's failure fails the caller."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, size, folder, function, args)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        results = [_read(Path(folder) / f"{rank}.pkl") for rank in range(size)]
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(results) if not ok]
        assert not failures, f"ranks still running after {timeout} s: {hung}\n" + "\n".join(failures)
        return [value for _, value in results]


def _rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(f"{folder}/{rank}.pkl").write_bytes(pickle.dumps(outcome))
    os._exit(0)  # a failed rank must not wait for its peers


def _read(path: Path) -> tuple[bool, Any]:
    return pickle.loads(path.read_bytes()) if path.exists() else (False, "ended without a result")
