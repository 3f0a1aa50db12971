"""launch/checkpoint.py: what it says of checkpoints that are whole, damaged, or different."""

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Launch, launch

from moe_train.checkpoint import dcp, examine
from moe_train.checkpoint.logical import LogicalTensor

pytestmark = pytest.mark.usefixtures("one_rank")

CONFIG = {"model": {"hidden_size": 16, "router": {"name": "topk"}}, "optim": {"lr": 1e-3}}


def tensors() -> dict[str, Any]:
    moments = {"state.w.exp_avg": torch.ones(3, 4), "state.w.step": torch.tensor(7.0)}
    return {"model": {"w": torch.arange(12.0).view(3, 4), "b": torch.zeros(5)}, "optimizer": moments}


def save(folder: Path, step: int, changes: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Path:
    content = tensors()
    content["model"] |= changes or {}
    content["model"] = {name: value for name, value in content["model"].items() if value is not None}
    state = {"loader": {"samples": step}, "config": config or CONFIG, "tokenizer": "bytes-257"}
    return dcp.save(folder / "checkpoints", step, content, state, {"config.yaml": b"{}"})


def flip(path: Path, tensor: str) -> None:
    """Change a number of a tensor."""
    chunk = examine.parse_manifest(path)["tensors"][tensor].chunks[0]
    file = path / chunk.file
    data = bytearray(file.read_bytes())
    data[chunk.start + chunk.bytes // 2] ^= 1
    file.write_bytes(data)


def lines(done: Launch) -> list[str]:
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_list(tmp_path: Path) -> None:
    one, two = save(tmp_path, 5), save(tmp_path, 10)
    (one / "__0_0.distcp").write_bytes((one / "__0_0.distcp").read_bytes()[:-9])
    left = tmp_path / "checkpoints" / ".tmp-step-00000015"
    left.mkdir()
    done = launch("checkpoint", "list", str(tmp_path))
    assert done.returncode == 0
    first, second, third = lines(done)
    assert first.startswith(f"{one}  0.0 MB  {one}: damaged: __0_0.distcp has ")
    assert "it holds model." in first
    assert second == f"{two}  0.0 MB  complete"
    assert third.startswith(f"{left}  0.0 MB  not complete: ")


def test_verify(tmp_path: Path) -> None:
    """Everything that is wrong is named, also where several things are."""
    one, two = save(tmp_path, 5), save(tmp_path, 10)
    done = launch("checkpoint", "verify", str(tmp_path))
    assert (done.returncode, lines(done)) == (0, [f"{one}: sound", f"{two}: sound"])
    flip(two, "model.w")
    flip(two, "optimizer.state.w.step")
    (two / "config.yaml").write_text("other")
    done = launch("checkpoint", "verify", str(one), str(two))
    assert done.returncode == 1
    found = lines(done)
    assert found[0] == f"{one}: sound"
    assert found[-1] == f"{two}: 3 problem(s)"
    for part in (
        "config.yaml has 5 of 2 bytes",
        "model.w, [3, 4] at [0, 0], in __0_0.distcp",
        "optimizer.state.w.step, [] at []",
    ):
        assert sum(part in line for line in found) == 1, part


def test_diff(tmp_path: Path) -> None:
    one = save(tmp_path / "a", 5)
    wider = tensors()["model"]["w"]
    wider[1, 2] += 0.5
    wider[2, 0] -= 0.25
    config = {"model": {"hidden_size": 16, "router": {"name": "topk", "top_k": 4}}, "optim": {"lr": 1e-4}}
    two = save(tmp_path / "b", 6, {"w": wider, "b": torch.zeros(6), "c": torch.zeros(1)}, config)
    done = launch("checkpoint", "diff", str(one), str(tmp_path / "b"))
    assert done.returncode == 1
    assert lines(done) == [
        "step: 5 and 6",
        "config: model.router.top_k: not there and 4",
        "config: optim.lr: 0.001 and 0.0001",
        "model.b: float32 [5] and float32 [6]",
        f"model.c: only in {two}",
        "model.w: largest difference 5.000e-01",
        f"{one} and {two}: 6 difference(s)",
    ]
    again = save(tmp_path / "c", 5)
    done = launch("checkpoint", "diff", str(one), str(again))
    assert (done.returncode, lines(done)) == (0, [f"{one} and {again}: the same"])


def test_a_damaged_checkpoint_is_not_compared(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    flip(two, "model.w")
    done = launch("checkpoint", "diff", str(one), str(two))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {two}: damaged: model.w, [3, 4] at [0, 0], in __0_0.distcp does not have the SHA-256"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["list", "{tmp}/gone"], "neither a checkpoint nor a folder with some"),
        (["diff", "{tmp}"], "1 path(s); it compares two checkpoints"),
        (["diff", "{tmp}", "{tmp}"], "neither a checkpoint nor a run folder with one"),
    ],
)
def test_mistakes_are_one_message(words: list[str], part: str, tmp_path: Path) -> None:
    done = launch("checkpoint", *(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("a", "b", "largest"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.5], 0.5),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([-0.0, 1e30], [0.0, 1e30], 0.0),
        ([], [], 0.0),
    ],
)
def test_numbers_that_are_none(a: list[float], b: list[float], largest: float, tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", 1, {"b": torch.tensor(a)}), save(tmp_path / "b", 1, {"b": torch.tensor(b)})
    expected = [] if largest == 0.0 else [f"model.b: largest difference {largest:.3e}"]
    assert list(examine.differences(one, two)) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0, 1, 1])
    one, two = (save(tmp_path / str(i), 1, {"b": (values * i).to(dtype)}) for i in (1, 0))
    assert list(examine.differences(one, two)) == ["model.b: largest difference 1.000e+00"]


def test_one_tensor_of_each_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {f"x{i}": torch.full((50,), float(i)) for i in range(20)}
    one, two = (save(tmp_path / name, 1, more) for name in "ab")
    alive: list[weakref.ref] = []
    load, most = LogicalTensor.load, 0

    def counted(tensor: LogicalTensor) -> torch.Tensor:
        nonlocal most
        value = load(tensor)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(LogicalTensor, "load", counted)
    assert not list(examine.differences(one, two))
    assert len(alive) == 2 * 24
    assert most <= 3  # the names of the last two are still bound when the next one comes
