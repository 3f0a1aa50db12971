"""A rank that ends with a mistake does not wait for the others, and they do not wait for it."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from moe_train import cli


def leave() -> float:
    """Rank 0 leaves while rank 1 is in a collective; the seconds until it has left, or until the other one notices."""
    dist.barrier()
    start = time.monotonic()
    if dist.get_rank() == 0:
        time.sleep(0.3)
        cli._leave_group(failed=True)
        assert not dist.is_initialized()
    else:
        with pytest.raises(RuntimeError, match="gloo"):
            dist.all_reduce(torch.ones(1))
    return time.monotonic() - start


def test_nobody_waits_where_a_rank_has_failed() -> None:
    assert max(run_ranks(2, leave, patience=60.0)) < 15.0


@pytest.mark.parametrize(("failed", "call"), [(True, "abort"), (False, "destroy")])
def test_only_a_rank_that_has_not_failed_waits_for_what_is_under_way(
    failed: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NCCL's groups do when they are destroyed."""
    calls: list[str] = []
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    cli._leave_group(failed)
    assert calls == [call]
