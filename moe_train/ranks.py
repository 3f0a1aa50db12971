"""Several real ranks on this machine: processes that talk over gloo, for proofs and tests."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from moe_train.errors import UserError

# Ranks are forked from a server that has imported these, since every rank would need seconds for it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["moe_train.train"])


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float | None = 240.0, patience: float = 60.0
) -> list[Any]:
    """`function(*args)` on `size` ranks in a process group; the results in rank order.

    A rank that fails, or is still running after `timeout` seconds (None: as long as it takes), is a RuntimeError with every rank's
    traceback, and one that raises UserError is that error. `patience`: seconds that a collective may take.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_context.Process(target=_rank, args=(rank, size, folder, patience, function, args)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        results = [_read(Path(folder) / f"{rank}.pkl") for rank in range(size)]
        for mistake in (value for _, value in results if isinstance(value, UserError)):
            raise mistake
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(results) if not ok]
        if failures:
            raise RuntimeError("\n".join([f"ranks still running after {timeout} s: {hung}" if hung else "", *failures]))
        return [value for _, value in results]


def _rank(rank: int, size: int, folder: str, patience: float, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    outcome: tuple[bool, Any]
    try:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=patience))
        dist.barrier()  # one that has nothing to say to the others must not end before they have connected
        outcome = (True, function(*args))
    except UserError as error:
        outcome = (False, error)
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(f"{folder}/{rank}.pkl").write_bytes(pickle.dumps(outcome))
    os._exit(0)  # a failed rank must not wait for its peers


def _read(path: Path) -> tuple[bool, Any]:
    return pickle.loads(path.read_bytes()) if path.exists() else (False, "ended without a result")
