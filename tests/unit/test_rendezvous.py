"""Ranks that start again on the same store never take what an earlier start has left for their own."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from moe_train.parallel.rendezvous import fresh_store

LONG = timedelta(seconds=20)


def start(store: dist.TCPStore, size: int, late: float = 0.0) -> list[dist.Store]:
    """All ranks of a start at once; rank 0 comes `late`."""
    stores: list[dist.Store] = [store] * size

    def run(rank: int) -> None:
        if rank == 0:
            time.sleep(late)
        mine = fresh_store(dist.TCPStore("127.0.0.1", store.port, is_master=False), rank, size, LONG)
        mine.set(f"address/{rank}", f"{rank} of {size}")
        stores[rank] = mine

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return stores


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_starts_do_not_see_each_other(store: dist.TCPStore) -> None:
    first = start(store, 3)
    assert [first[0].get(f"address/{rank}") for rank in range(3)] == [b"0 of 3", b"1 of 3", b"2 of 3"]
    for size in (2, 3):  # rank 0 is the last one to come, and the others find the old offer first
        again = start(store, size, late=1.5)
        for rank in range(size):
            assert again[rank].get(f"address/{size - 1}") == f"{size - 1} of {size}".encode()
        assert not again[0].check(["address/3"])
    assert first[1].get("address/1") == b"1 of 3"


def test_a_rank_that_does_not_come_ends_the_wait(store: dist.TCPStore) -> None:
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 0, 2, timedelta(seconds=0.5))
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 1, 2, timedelta(seconds=0.5))
