"""A forged checkpoint runs no code, reads nothing outside of its folder, and fills no tensor by half."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import reseal
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_train.checkpoint import dcp
from moe_train.checkpoint.examine import problems
from moe_train.checkpoint.logical import logical_tensors
from moe_train.checkpoint.reader import index_of
from moe_train.errors import UserError

pytestmark = pytest.mark.usefixtures("one_rank")


class Order:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def tensors() -> dict[str, Any]:
    return {"model": {"w": torch.arange(12.0).view(3, 4), "b": torch.tensor(2.0)}}


def blank() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(3, 4), "b": torch.tensor(0.0)}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return dcp.save(tmp_path / "c", 3, tensors(), {"loader": {}}, {"config.yaml": b"{}"})


def refusal(folder: Path, into: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        dcp.load(folder, blank() if into is None else into)
    return str(caught.value)


def test_tensors_come_back(checkpoint: Path) -> None:
    found = blank()
    assert dcp.load(checkpoint, found)["step"] == 3
    assert torch.equal(found["model"]["w"], tensors()["model"]["w"])
    assert torch.equal(found["model"]["b"], torch.tensor(2.0))


def test_the_index_is_made_from_the_manifest_and_says_what_torch_says(tmp_path: Path) -> None:
    """torch's own reader of `.metadata` finds the same tensors at the same places."""
    halves = {"model": {"w": torch.arange(12.0).view(3, 4), "n": torch.arange(3), "h": torch.ones(2, dtype=torch.bfloat16)}}
    folder = dcp.save(tmp_path / "c", 3, halves, {"loader": {}}, {})
    theirs, ours = FileSystemReader(folder).read_metadata(), index_of(dcp.read_manifest(folder)["tensors"])
    assert ours.storage_data == theirs.storage_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, tensor in ours.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        other = theirs.state_dict_metadata[name]
        assert isinstance(other, TensorStorageMetadata)
        assert (tensor.size, tensor.chunks, tensor.properties.dtype) == (other.size, other.chunks, other.properties.dtype)


def test_an_index_that_is_a_program_never_runs(checkpoint: Path, tmp_path: Path) -> None:
    """It is not what was saved; and if the manifest is forged with it, nothing reads it."""
    sentinel = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Order(sentinel)))
    assert "damaged: .metadata has " in refusal(checkpoint)
    reseal(checkpoint)
    found = blank()
    dcp.load(checkpoint, found)
    assert torch.equal(found["model"]["w"], tensors()["model"]["w"])
    assert list(problems(checkpoint)) == []
    assert not sentinel.exists()


def edit_manifest(folder: Path, edit: Callable[[dict], Any]) -> None:
    """Change the tensors of a manifest and seal it."""

    def edited(manifest: dict) -> dict:
        edit(manifest["tensors"])
        return manifest

    reseal(folder, edited)


def test_what_is_no_tensor_is_neither_saved_nor_read(checkpoint: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    with pytest.raises(UserError, match="extra is no tensor, and only tensors are saved"):
        dcp.save(tmp_path / "d", 3, {**tensors(), "extra": Order(sentinel)}, {}, {})
    sentinel.unlink(missing_ok=True)  # planning a save copies what it saves
    assert "extra is no tensor, and only tensors are read" in refusal(checkpoint, {**blank(), "extra": 0})
    assert not sentinel.exists()


def test_a_tensor_that_holds_an_object_is_not_unpickled(tmp_path: Path) -> None:
    """Everything agrees with it."""
    sentinel = tmp_path / "ran"
    folder = dcp.save(tmp_path / "c", 3, {"model": {"w": torch.arange(12.0).view(3, 4)}}, {"loader": {}}, {})
    torch.save(Order(sentinel), folder / "__0_0.distcp")
    size = (folder / "__0_0.distcp").stat().st_size
    edit_manifest(folder, lambda listed: listed["model.w"]["chunks"][0].__setitem__(4, size))
    reseal(folder)
    message = refusal(folder, {"model": {"w": torch.zeros(3, 4)}})
    assert "model.w, [3, 4] at [0, 0], in __0_0.distcp holds no tensor: UnpicklingError" in message
    assert "weights_only" not in message  # torch advises to turn it off
    (tensor,) = logical_tensors(folder)
    with pytest.raises(UserError, match=r"model.w, \[3, 4\] at \[0, 0\], in __0_0.distcp holds no tensor"):
        tensor.load()
    assert not sentinel.exists()


def test_records_that_nobody_asks_for_are_compared_too(tmp_path: Path) -> None:
    folder = dcp.save(tmp_path / "c", 3, {**tensors(), "optimizer": {"m": torch.ones(64)}}, {"loader": {}}, {})
    assert dcp.load(folder, blank())["step"] == 3
    (moment,) = logical_tensors(folder, "optimizer")
    shard = folder / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[moment.entry.chunks[0].start + moment.entry.chunks[0].bytes // 2] ^= 1
    shard.write_bytes(data)
    assert "optimizer.m, [64] at [0], in __0_0.distcp does not have the SHA-256" in refusal(folder)


def chunk(position: int, value: Any) -> Callable[[dict], Any]:
    return lambda listed: listed["model.w"]["chunks"][0].__setitem__(position, value)


UNTYPED = "manifest.json has no shape, dtype and chunks of each tensor"


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (chunk(0, [1, 0]), "model.w of [3, 4] has a chunk of [3, 4] at [1, 0] in __0_0.distcp, which is not inside of it"),
        (chunk(1, [2, 4]), "model.w of [3, 4] lacks [1, 4] at [2, 0], which is in no file"),
        (chunk(2, "../secret.distcp"), "model.w is in '../secret.distcp', which is no shard"),
        (chunk(2, "/etc/passwd"), "model.w is in '/etc/passwd', which is no shard"),
        (chunk(2, "config.yaml"), "model.w is in 'config.yaml', which is no shard"),
        (chunk(2, 3), UNTYPED),
        (chunk(3, -1), UNTYPED),
        (chunk(3, 2**62), "of __0_0.distcp"),
        (chunk(4, 2**62), "of __0_0.distcp"),
        (chunk(4, 0), "of __0_0.distcp, 0 long"),
        (chunk(5, None), UNTYPED),
        (chunk(0, [0]), UNTYPED),
        (chunk(0, [0.0, 0]), UNTYPED),
        (lambda listed: listed["model.w"]["chunks"].clear(), "model.w of [3, 4] lacks [3, 4] at [0, 0]"),
        (lambda listed: listed["model.w"]["chunks"].append(listed["model.w"]["chunks"][0]), "that overlaps another one"),
        (lambda listed: listed["model.w"].update(dtype="complex1"), UNTYPED),
        (lambda listed: listed["model.w"].update(dtype="float64"), "model.w is float64 [3, 4] in manifest.json, where float32"),
        (lambda listed: listed["model.w"].update(shape=[3, 4, 1]), UNTYPED),
        (lambda listed: listed["model.w"].pop("chunks"), UNTYPED),
        (lambda listed: listed.update({"model.w": 3}), UNTYPED),
        (lambda listed: listed.pop("model.b"), "bytes, of which tensors have"),
        (lambda listed: listed.update({"model.c": {**listed["model.b"], "chunks": []}}), "model.c of [] lacks [] at []"),
        (lambda listed: listed.update({"model.c": listed["model.b"]}), "where the record before ends at"),
    ],
)
def test_a_manifest_with_a_tensor_that_is_not_whole_is_refused(checkpoint: Path, edit: Callable, part: str) -> None:
    (checkpoint.parent / "secret.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    edit_manifest(checkpoint, edit)
    message = refusal(checkpoint)
    assert part in message
    assert str(checkpoint) in message
    assert "\n" not in message


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path) -> None:
    """Another shape, another type, a tensor too few, a tensor too many; sections that nobody asks for do not matter."""
    wide = {**blank()["model"], "w": torch.zeros(3, 5)}
    assert "model.w is float32 [3, 4] in manifest.json, where float32 [3, 5] is wanted" in refusal(checkpoint, {"model": wide})
    fine = {**blank()["model"], "w": torch.zeros(3, 4, dtype=torch.float64)}
    assert "model.w is float32 [3, 4] in manifest.json, where float64 [3, 4] is wanted" in refusal(checkpoint, {"model": fine})
    more = {**blank()["model"], "v": torch.zeros(3)}
    assert "model.v, float32 [3], is missing in manifest.json" in refusal(checkpoint, {"model": more})
    assert "model.b in manifest.json, which nothing asks for" in refusal(checkpoint, {"model": {"w": torch.zeros(3, 4)}})


def test_a_record_of_another_type_than_the_manifest_says_is_refused(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda listed: listed["model.w"].update(dtype="float64"))
    fine = {**blank()["model"], "w": torch.zeros(3, 4, dtype=torch.float64)}
    assert "model.w, [3, 4] at [0, 0], in __0_0.distcp holds something else" in refusal(checkpoint, {"model": fine})


def test_a_save_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """What must be there is known from the whole model."""
    whole = {f"model.{name}": value.to("meta") for name, value in tensors()["model"].items()}
    before = dcp.save(tmp_path, 1, tensors(), {}, {}, whole)
    for wrong, part in (
        ({"w": torch.zeros(3, 4)}, "model.b, float32 [], is missing in the shards"),
        ({**tensors()["model"], "c": torch.zeros(2)}, "model.c in the shards, which nothing asks for"),
        ({**tensors()["model"], "b": torch.tensor(1)}, "model.b is int64 [] in the shards, where float32 [] is wanted"),
    ):
        with pytest.raises(UserError, match=re.escape(part)) as caught:
            dcp.save(tmp_path, 2, {"model": wrong}, {}, {}, whole)
        assert not isinstance(caught.value, dcp.NotSaved)  # which training would go on after
        assert [path.name for path in tmp_path.iterdir()] == [before.name]


def test_logical_tensors(checkpoint: Path) -> None:
    found = {tensor.name: tensor for tensor in logical_tensors(checkpoint)}
    assert list(found) == ["b", "w"]
    assert (found["w"].shape, found["w"].dtype) == ((3, 4), torch.float32)
    for name, value in tensors()["model"].items():
        assert torch.equal(found[name].load(), value)
    assert not list(logical_tensors(checkpoint, "optimizer"))
    data = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    data[found["w"].entry.chunks[0].start + 500] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(data)
    with pytest.raises(UserError, match=r"model.w, \[3, 4\] at \[0, 0\], in __0_0.distcp does not have the SHA-256"):
        found["w"].load()


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: {**state, "step": 4},
        lambda state: {**state, "step": True},
        lambda state: {**state, "step": -1},
        lambda state: {**state, "files": [1]},
        lambda state: {**state, "files": {**state["files"], "../c": {"bytes": 1, "sha256": ""}}},
        lambda state: {**state, "files": {**state["files"], "config.yaml": 3}},
        lambda state: {**state, "files": {**state["files"], "config.yaml": {}}},
        lambda state: {**state, "files": {**state["files"], "__0_0.distcp": {"bytes": "1"}}},
        lambda state: {**state, "tensors": []},
        lambda state: {key: value for key, value in state.items() if key != "tensors"},
        lambda state: {key: value for key, value in state.items() if key != "files"},
        lambda state: [state],
        lambda state: None,
    ],
)
def test_a_state_that_is_none_is_refused(checkpoint: Path, edit: Callable) -> None:
    reseal(checkpoint, edit)
    assert str(checkpoint) in refusal(checkpoint)


def test_every_byte_of_the_manifest_counts(checkpoint: Path) -> None:
    """Also those that can change and leave what it says."""
    reseal(checkpoint, lambda state: {**state, "config": {"lr": 1e-05}})
    written = (checkpoint / "manifest.json").read_bytes()
    for old, new in ((b", ", b",\t"), (b": ", b":\n"), (b"1e-05", b"1E-05")):
        changed = written.replace(old, new, 1)
        assert changed != written
        assert json.loads(changed) == json.loads(written)
        (checkpoint / "manifest.json").write_bytes(changed)
        assert "manifest.json is not as it was saved" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "/dev/null", ""])
def test_a_path_without_a_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        dcp.find(Path(name))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b"1" * 5000])
def test_a_state_that_is_no_json_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "manifest.json").write_bytes(content)
    assert "not a complete checkpoint" in refusal(checkpoint)
