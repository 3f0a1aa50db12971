"""Saving: what happens in which order, and what is there when it stops half-way."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from moe_train.checkpoint import dcp
from moe_train.errors import UserError

pytestmark = pytest.mark.usefixtures("one_rank")


def save(folder: Path, step: int) -> Path:
    return dcp.save(
        folder, step, {"x": torch.full((4,), float(step))}, {"loader": {"samples": step}}, {"config.yaml": b"run: {}"}
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    tensors = {"x": torch.zeros(4)}
    state = dcp.load(path, tensors)
    assert (state["step"], state["loader"]) == (7, {"samples": 7})
    assert torch.equal(tensors["x"], torch.full((4,), 7.0))
    assert (path / "config.yaml").read_bytes() == b"run: {}"


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def recorded_sync(handle: int) -> None:
        sync(handle)
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))

    def recorded_rename(source: Any, target: Any) -> None:
        if os.path.isdir(source):
            there = sorted(path.name for path in Path(source).iterdir())
            assert there == [".metadata", "__0_0.distcp", "config.yaml", "manifest.json"]
            events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    path = save(tmp_path, 1)
    named = events.index(("rename", str(path)))
    synced = {Path(file).name for kind, file in events[:named] if kind == "sync"}
    for name in ("__0_0.distcp", ".metadata", "config", "manifest"):  # some of them under a temporary name
        assert any(name in file for file in synced), name
    assert ("sync", str(tmp_path / ".tmp-step-00000001")) in events[:named]
    assert ("sync", str(tmp_path)) in events[named:]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last file that is written."""
    before = save(tmp_path, 1)
    write = dcp.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == dcp.MANIFEST_FILE:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(dcp, "write_atomically", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; .* MB are free; make room"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    assert dcp.load(before, {"x": torch.zeros(4)})["step"] == 1


def test_an_error_that_is_not_the_disks_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(dcp, "hash_record", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        save(tmp_path, 1)


def planned(rank: int, offset: int, rows: int, whole: int = 4, dtype: torch.dtype = torch.float32) -> SavePlan:
    """A rank that wants to write `rows` rows of w [whole, 2] from `offset`."""
    chunk = ChunkStorageMetadata(torch.Size([offset, 0]), torch.Size([rows, 2]))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size([whole, 2]))
    return SavePlan([WriteItem(MetadataIndex("w", chunk.offsets), WriteItemType.SHARD, tensor_data=data)])


@pytest.mark.parametrize(
    ("second", "part"),
    [
        (planned(1, 2, 1), "w of [4, 2] lacks [1, 2] at [3, 0], which is in no file"),
        (planned(1, 1, 3), "w of [4, 2] has a chunk of [3, 2] at [1, 0] in __1_0.distcp that overlaps another one"),
        (planned(1, 3, 2), "w of [4, 2] has a chunk of [2, 2] at [3, 0] in __1_0.distcp, which is not inside of it"),
        (planned(1, 0, 4), "w has chunks of [2, 2] and [4, 2] at [0, 0] in __0_0.distcp and __1_0.distcp"),
        (planned(1, 2, 2, whole=5), "w is float32 [5, 2] in __1_0.distcp, where float32 [4, 2] is wanted"),
        (planned(1, 2, 2, dtype=torch.int8), "w is int8 [4, 2] in __1_0.distcp, where float32 [4, 2] is wanted"),
    ],
)
def test_ranks_that_do_not_agree_save_nothing(second: SavePlan, part: str) -> None:
    """Before a byte is written. Two ranks with the same chunk are no mistake: one of them writes it."""
    dcp._planned([planned(0, 0, 2), planned(1, 2, 2), planned(2, 2, 2)])
    with pytest.raises(ValueError, match=re.escape(part)):
        dcp._planned([planned(0, 0, 2), second])


def test_a_checkpoint_is_never_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes, the run has hidden the folder before; the next save deletes the rest."""
    for step in (1, 2, 3):
        save(tmp_path, step)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        dcp.keep(tmp_path, last=2, every=0)
    assert [path.name for path in dcp.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "step-00000001").exists()
    monkeypatch.undo()
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_newest_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    (tmp_path / "step-100000001").write_text("a file")
    assert [dcp.step_of(path) for path in dcp.checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "__0_0.distcp").unlink()
    save(tmp_path, 3)
    assert dcp.load(path, {"x": torch.zeros(4)})["step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
