"""A store of its own for each start of a worker group.

torchrun's agent keeps one store over all restarts, and torch puts no prefix before the keys of a start (2.13): ranks that start again
may read the addresses of those that died, and fail to connect or wait for ever. So the ranks of a start agree on a name first. Nothing
in the environment tells one start from the next (a change of the number of nodes is no restart to torchrun), and whatever is read from
the store may be old, so that the agreement is a challenge and a response: rank 0 offers a name, each rank answers with a number that it
has just drawn, and goes on when rank 0 has seen that number.
"""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(seconds=1)  # for rank 0's reply, before its offer is taken for an old one


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that no earlier start has written to; all ranks of this start call it together.

    Raises torch's DistStoreError where a rank does not come within `timeout`.
    """
    return dist.PrefixStore(_offer(store, size, timeout) if rank == 0 else _answer(store, rank, timeout), store)


def _offer(store: dist.Store, size: int, timeout: timedelta) -> str:
    name = f"start-{secrets.token_hex(8)}"
    store.set("start", name)
    for rank in range(1, size):
        store.wait([f"{name}/{rank}"], timeout)
        store.set(f"{name}/{store.get(f'{name}/{rank}').decode()}", "seen")
    return name


def _answer(store: dist.Store, rank: int, timeout: timedelta) -> str:
    mine, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    while True:
        store.wait(["start"], timeout)
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", mine)
        try:
            store.wait([f"{name}/{mine}"], PATIENCE)
            return name
        except dist.DistStoreError:  # an old offer, or a slow rank 0
            if time.monotonic() > end:
                raise
