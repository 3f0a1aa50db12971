"""Saving in the background: what is in the copy, who waits for whom, and what a refusal or an error does."""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moe_train.checkpoint import dcp
from moe_train.checkpoint.logical import logical_tensors
from moe_train.checkpoint.saver import Saver


class LostError(RuntimeError):
    """Other ranks are gone."""


def saver_of(folder: Path, asynchronous: bool = True, last: int = 2) -> Saver:
    device = torch.device("cpu")
    return Saver(folder, asynchronous=asynchronous, last=last, every=0, device=device, timeout_seconds=30, lost=LostError)


@pytest.fixture
def gate(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Saves wait until it is set, before they write anything."""
    opened, save = threading.Event(), dcp.save

    def wait_and_save(*args: Any) -> Path:
        assert opened.wait(30)
        return save(*args)

    monkeypatch.setattr(dcp, "save", wait_and_save)
    yield opened
    opened.set()


def start(saver: Saver, step: int, value: torch.Tensor | None = None) -> None:
    saver.start(step, {"model": {"x": torch.full((4,), float(step)) if value is None else value}}, {}, {})


def value_in(path: Path) -> float:
    (tensor,) = logical_tensors(path)
    return float(tensor.load()[0])


def test_training_goes_on_and_changes_nothing_in_the_copy(gate: threading.Event, tmp_path: Path) -> None:
    """Twice, since the second copy goes to the memory of the first."""
    x = torch.zeros(4)
    with saver_of(tmp_path) as saver:
        for step in (1, 2):
            gate.clear()
            x.fill_(step)
            start(saver, step, x)  # returns, although nothing can be written yet
            x.fill_(99)
            assert not saver.done
            gate.set()
            assert saver.wait() is None
            assert value_in(tmp_path / f"step-0000000{step}") == step
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_save_in_flight_is_waited_for_on_leaving(gate: threading.Event, tmp_path: Path) -> None:
    for step, error in ((1, None), (2, ValueError), (3, FloatingPointError)):
        gate.clear()
        threading.Timer(0.1, gate.set).start()
        try:
            with saver_of(tmp_path) as saver:
                start(saver, step)
                if error is not None:
                    raise error
        except (ValueError, FloatingPointError):
            pass
        assert dcp.checkpoints(tmp_path)[-1].name == f"step-0000000{step}"


@pytest.mark.parametrize("error", [LostError, KeyboardInterrupt, SystemExit])
def test_where_ranks_are_lost_nobody_waits(error: type[BaseException], gate: threading.Event, tmp_path: Path) -> None:
    with pytest.raises(error), saver_of(tmp_path) as saver:  # noqa: PT012
        start(saver, 1)
        raise error
    assert not list(tmp_path.iterdir())


def test_without_the_background_it_is_there_at_once(one_rank: None, tmp_path: Path) -> None:
    with saver_of(tmp_path, asynchronous=False) as saver:
        start(saver, 1)
        assert saver.done
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert saver.wait() is None
        assert not saver.done


def refuse(name: str) -> Callable[[Path, bytes], None]:
    def write(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")

    return write


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_refusal_is_returned_and_the_next_save_succeeds(
    asynchronous: bool, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver_of(tmp_path, asynchronous) as saver:
        monkeypatch.setattr(dcp, "write_atomically", refuse(dcp.MANIFEST_FILE))
        start(saver, 1)
        refused = saver.wait()
        assert str(refused).startswith(f"step 1 is not saved: {tmp_path}: cannot be written: No space left on device; ")
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()
        start(saver, 2)
        assert saver.wait() is None
        assert value_in(tmp_path / "step-00000002") == 2


def test_an_error_of_the_code_is_raised(one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(dcp, "hash_record", broken)
    with saver_of(tmp_path) as saver:
        start(saver, 1)
        with pytest.raises(RuntimeError, match="a bug"):
            saver.wait()


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with saver_of(tmp_path, last=1) as saver, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(dcp, "_delete", denied)
        for step in (1, 2):
            start(saver, step)
            assert saver.wait() is None
    assert [path.name for path in dcp.checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]
    assert "old checkpoints cannot be deleted" in caplog.text


def save_on_two_ranks(folder: Path) -> dict[str, Any]:
    """Save three times: from both ranks, without one rank's expert, and with a disk that refuses rank 1 alone."""
    mesh = init_device_mesh("cpu", (2,))
    experts = distribute_tensor(torch.arange(24.0).view(4, 3, 2), mesh, [Shard(0)])
    found: dict[str, Any] = {}
    with saver_of(folder) as saver:
        saver.start(1, {"model": {"experts": experts}}, {}, {})
        found["first"] = saver.wait()
        mine = {"experts": experts, "router": torch.zeros(2)} if dist.get_rank() == 0 else {"router": torch.zeros(2)}
        saver.start(2, {"model": mine}, {}, {})
        try:
            saver.wait()
        except Exception as error:
            found["lacking"] = (type(error).__name__, str(error))
        if dist.get_rank() == 1:
            dcp.hash_record = refuse_reading
        saver.start(3, {"model": {"experts": experts}}, {}, {})
        found["refused"] = re.sub(r"[\d.]+ MB", "some MB", str(saver.wait()))  # each rank has looked for itself
    return found


def refuse_reading(*_: object) -> str:
    raise OSError(5, "Input/output error")


def test_two_ranks_agree(tmp_path: Path) -> None:
    one, two = run_ranks(2, save_on_two_ranks, tmp_path)
    assert one == two
    assert one["first"] is None
    kind, said = one["lacking"]
    assert kind == "UserError"
    assert "model.experts of [4, 3, 2] lacks [2, 3, 2] at [2, 0, 0], which is in no file" in said
    assert one["refused"].startswith(f"step 3 is not saved: {tmp_path}: cannot be written: Input/output error")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (tensor,) = logical_tensors(tmp_path / "step-00000001")
    assert torch.equal(tensor.load(), torch.arange(24.0).view(4, 3, 2))
    assert [chunk.file for chunk in tensor.entry.chunks] == ["__0_0.distcp", "__1_0.distcp"]
