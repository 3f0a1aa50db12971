"""A forged checkpoint runs no code, reads nothing outside of its folder, and fills no tensor by half."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import reseal
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorProperties

from moe_train.checkpoint import dcp
from moe_train.errors import UserError


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def edit_index(folder: Path, edit: Callable[[Metadata], Any]) -> None:
    """Change the index and make everything agree with it."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reseal(folder)


def refusal(folder: Path, into: dict[str, Any] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        dcp.load(folder, blank() if into is None else into)
    return str(caught.value)


def test_tensors_come_back(checkpoint: Path) -> None:
    found = blank()
    assert dcp.load(checkpoint, found)["step"] == 3
    assert torch.equal(found["model"]["w"], tensors()["model"]["w"])
    assert torch.equal(found["model"]["b"], torch.tensor(2.0))


def build_on(made: Any, state: Any) -> bytes:
    """A pickle that sets the state of something that is no record."""
    return pickle.PROTO + b"\x04" + pickle.dumps(made)[2:-1] + pickle.dumps(state)[2:-1] + pickle.BUILD + pickle.STOP


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (lambda sentinel: pickle.dumps(Order(sentinel)), "asks for posix.system"),
        (lambda sentinel: pickle.dumps(Order(sentinel), protocol=2), "KeyError: 99"),
        (lambda sentinel: pickle.dumps({Order(sentinel): 1}), "asks for posix.system"),
        (lambda sentinel: pickle.dumps(eval), "asks for builtins.eval"),
        (lambda sentinel: pickle.dumps(torch.load), "asks for torch.serialization.load"),
        (lambda sentinel: pickle.dumps(torch.zeros(2)), "asks for torch._utils"),
        (lambda sentinel: build_on(TensorProperties, (None, {"forged": 1})), "changes what is no record"),
        (lambda sentinel: build_on(torch.Size([1]), {"forged": 1}), "changes what is no record"),
        (lambda sentinel: b"\x80\x04Nr\xff\xff\xff\xff.", "damaged"),  # LONG_BINPUT: room for 2^32 objects
        (lambda sentinel: b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.", "damaged"),  # BYTEARRAY8 of 64 GiB
        (lambda sentinel: b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "damaged"),  # FRAME of 2^63
        (lambda sentinel: b"\x80\x04X\xff\xff\xff\xffab.", "damaged"),  # text of 4 GiB
        (lambda sentinel: pickle.dumps([]), "holds a list"),
        (lambda sentinel: pickle.dumps(Metadata(state_dict_metadata=None)), "damaged"),
        (lambda sentinel: b"", "damaged"),
        (lambda sentinel: b"\x80\x04.", "damaged"),
    ],
)
def test_an_index_that_is_a_program_is_refused(checkpoint: Path, tmp_path: Path, content: Callable, part: str) -> None:
    sentinel = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(content(sentinel))
    reseal(checkpoint)
    message = refusal(checkpoint)
    assert str(checkpoint / ".metadata") in message
    assert part in message
    assert not sentinel.exists()
    assert not hasattr(TensorProperties, "forged")


def test_an_object_in_a_shard_is_never_unpickled(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    folder = dcp.save(tmp_path / "c", 3, {**tensors(), "extra": Order(sentinel)}, {"loader": {}}, {})
    sentinel.unlink(missing_ok=True)  # saving copies what it saves
    dcp.load(folder, blank())
    assert "extra is no tensor in the checkpoint, and only tensors are read" in refusal(folder, {**blank(), "extra": 0})
    edit_index(folder, lambda index: index.state_dict_metadata.update({"model.w": BytesStorageMetadata()}))
    edit_index(
        folder, lambda index: index.storage_data.update({MetadataIndex("model.w"): index.storage_data[MetadataIndex("extra")]})
    )
    assert "model.w is no tensor in the checkpoint" in refusal(folder)
    assert not sentinel.exists()


def test_a_tensor_that_holds_an_object_is_not_unpickled(checkpoint: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    torch.save(Order(sentinel), checkpoint / "__0_0.distcp")
    size = (checkpoint / "__0_0.distcp").stat().st_size
    edit_index(checkpoint, lambda index: [vars(place).update(offset=0, length=size) for place in index.storage_data.values()])
    message = refusal(checkpoint)
    assert "a shard is damaged, or holds something that is no tensor" in message
    assert "weights_only" not in message  # torch advises to turn it off
    assert not sentinel.exists()


def place(**changes: Any) -> Callable[[Metadata], Any]:
    return lambda index: [vars(where).update(changes) for where in index.storage_data.values()]


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (place(relative_path="../secret.distcp"), "no file of this checkpoint"),
        (place(relative_path="/etc/passwd"), "no file of this checkpoint"),
        (place(relative_path=3), "no file of this checkpoint"),
        (place(offset=-1), "at byte -1"),
        (place(length=2**60), "of __0_0.distcp"),
        (place(offset=2**62), "of __0_0.distcp"),
        (place(transform_descriptors=["stream.zstd"]), "is encoded by"),
        (lambda index: index.state_dict_metadata["model.w"].chunks.clear(), "has 0 of its 12 numbers"),
        (
            lambda index: vars(index.state_dict_metadata["model.w"].chunks[0]).update(sizes=torch.Size([2, 4])),
            "has 8 of its 12",
        ),
        (
            lambda index: vars(index.state_dict_metadata["model.w"].chunks[0]).update(offsets=torch.Size([1, 0])),
            "has a chunk of",
        ),
        (lambda index: vars(index.state_dict_metadata["model.w"]).update(size=torch.Size([2**60, 2**60])), "numbers"),
        (lambda index: index.storage_data.clear(), "cannot be loaded into this model"),
        (lambda index: index.state_dict_metadata.pop("model.b"), "Missing key in checkpoint state_dict: model.b"),
        (lambda index: vars(index).update(storage_data=3), "damaged"),
        (lambda index: vars(index).update(state_dict_metadata={"model.w": 3}), "damaged"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(checkpoint: Path, edit: Callable, part: str) -> None:
    (checkpoint.parent / "secret.distcp").write_bytes((checkpoint / "__0_0.distcp").read_bytes())
    edit_index(checkpoint, edit)
    assert part in refusal(checkpoint)


def test_a_checkpoint_of_another_shape_is_refused(checkpoint: Path) -> None:
    message = refusal(checkpoint, {"model": {"w": torch.zeros(3, 5)}})
    assert "ValueError: Size mismatch between saved torch.Size([3, 4]) and current: torch.Size([3, 5]) for model.w" in message
    assert "Missing key in checkpoint state_dict: model.v" in refusal(checkpoint, {"model": {"v": torch.zeros(3, 4)}})


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
        lambda state: {key: value for key, value in state.items() if key != "files"},
        lambda state: [state],
        lambda state: None,
    ],
)
def test_a_state_that_is_none_is_refused(checkpoint: Path, edit: Callable) -> None:
    reseal(checkpoint, edit)
    assert str(checkpoint) in refusal(checkpoint)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "/dev/null", ""])
def test_a_path_without_a_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        dcp.find(Path(name))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b"1" * 5000])
def test_a_state_that_is_no_json_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "state.json").write_bytes(content)
    assert "not a complete checkpoint" in refusal(checkpoint)
