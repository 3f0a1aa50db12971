"""The speed benchmark: what a row says, sides that take turns, and the rival's shape."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import TOPK, config_of

from moe_train import versus
from moe_train.benchmark import RandomRows, append
from moe_train.cli import parse
from moe_train.config import Config
from moe_train.engine.model import Model
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.parallel.mesh import World, start_world
from moe_train.rivals import Mixtral, build_mixtral, load_rival

ROOT = Path(__file__).parents[2]
SHAPE = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_experts=4", "model.ffn_hidden_size=16"]
TRAIN = ["model.vocab_size=320", "train.seq_len=16", "train.global_batch_size=4", "train.micro_batch_size=2"]
WORDS = ["configs/benchmark_8x512.yaml", *SHAPE, *TRAIN]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/benchmark.py", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_run(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = bench(*WORDS, "--steps", "3", "--warmup", "1", "--output", str(file))
    assert done.returncode == 0, done.stderr
    (row,) = read(file)
    assert row["tokens_per_second_p20"] <= row["tokens_per_second"] <= row["tokens_per_second_p80"]
    assert set(row["seconds_per_step"]) == {"data", "forward", "backward", "optimizer"}
    assert row["steps"] == 3
    assert 0 < row["memory_before_model_bytes"] <= row["peak_memory_bytes"]
    assert row["torch"] == torch.__version__
    assert row["cross_entropy_last"] < row["cross_entropy_first"] < 7  # it trains; ln 320 = 5.8
    assert row["health"]["dead_experts"] >= 0
    assert f"{row['tokens_per_second']:.0f} tokens/s" in done.stdout


def test_two_sides_take_turns(tmp_path: Path) -> None:
    """A side with half the layers must come out faster, and each row must hold its own side's figures."""
    file = tmp_path / "rows.jsonl"
    deep = ["model.num_layers=8", "model.hidden_size=64"]
    done = bench(*WORDS, "--against", *deep, "--steps", "5", "--warmup", "2", "--output", str(file))
    assert done.returncode == 0, done.stderr
    ours, theirs = read(file)
    assert [ours["side"], theirs["side"]] == ["ours", " ".join(deep)]
    assert ours["tokens_per_second"] > theirs["tokens_per_second"]
    assert theirs["ratio_p20"] <= theirs["ratio"] <= theirs["ratio_p80"]
    assert theirs["ratio"] > 1
    assert theirs["processor_ratio"] > 1
    assert theirs["memory_ratio"] == ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
    assert f"ours / {theirs['side']}: speed {theirs['ratio']:.3f}" in done.stdout


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine halves its speed in the middle; the ratio must not see it."""
    speeds = {"a": iter([90.0, 100, 100, 50, 50, 50]), "b": iter([9.0, 50, 50, 25, 25, 25])}
    row = {"processor_seconds_per_step": 1.0, "peak_memory_bytes": 10}
    order = []

    def ask(name: str, method: str) -> object:
        if method == "step":
            order.append(name)
        return {"step": lambda: next(speeds[name]), "forget": lambda: None, "row": lambda: dict(row)}[method]()

    class Started:
        def __enter__(self) -> list[str]:
            return ["a", "b"]

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(versus, "_ask", ask)
    monkeypatch.setattr(versus, "_started", lambda sides: Started())
    rows = versus.compare([versus.Side(name, Path("x"), []) for name in "ab"], rounds=5, warmup=1)
    assert order == ["a", "b"] + ["a", "b"] * 5
    assert (rows[1]["ratio_p20"], rows[1]["ratio"], rows[1]["ratio_p80"]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--against", "model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["--against", "model.num_heads=3"], "must divide model.hidden_size"),
    ],
)
def test_mistakes_are_one_message(words: list[str], part: str) -> None:
    done = bench(*WORDS, *words)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_several_ranks_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one rank each"):
        versus.compare([], 1, 0)


def test_a_mistake_in_a_side_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a run file"):
        versus.compare([versus.Side("gone", tmp_path / "gone.yaml", [])], 1, 0)


def test_a_side_that_dies_is_no_result(capfd: pytest.CaptureFixture) -> None:
    here = ROOT / WORDS[0]
    with pytest.raises(RuntimeError, match="ended before its work was done"):
        versus.compare([versus.Side("dies", here, [*WORDS[1:], "parallel.dp_replicate=1"], rival="unknown")], 1, 0)
    assert "unknown" in capfd.readouterr().err


def test_rows_are_appended(tmp_path: Path) -> None:
    for i in range(2):
        append({"i": i}, tmp_path / "a" / "rows.jsonl")
    assert read(tmp_path / "a" / "rows.jsonl") == [{"i": 0}, {"i": 1}]


def test_a_rival_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'moe_train\[hf\]'"):
        load_rival("hf")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="needs the extra [hf]: pip install 'moe_train[hf]'")


def tiny(**model: object) -> Config:
    content = config_of(TOPK, num_kv_heads=1, **model).model_dump(mode="json")
    train = {"seq_len": 16, "global_batch_size": 4, "micro_batch_size": 2, "device": "cpu"}
    return parse(content | {"train": train, "optim": {"clip_norm": 0.1}}, "test")


def copied(decoder: Model) -> dict[str, torch.Tensor]:
    """Our parameters under Mixtral's names."""
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "mlp.gate.weight",
        "mlp.experts.gate_up": "mlp.experts.gate_up_proj",
        "mlp.experts.down": "mlp.experts.down_proj",
        **{
            f"attention.{ours}.weight": f"self_attn.{x}_proj.weight"
            for ours, x in zip(("q", "k", "v", "out"), "qkvo", strict=True)
        },
    }
    found = {}
    for name, value in decoder.named_parameters():
        prefix, rest = (
            (f"model.layers.{name.split('.')[1]}.", name.split(".", 2)[2]) if name.startswith("layers.") else ("", name)
        )
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        found[prefix + names[rest]] = whole.flatten(1, 2) if rest == "mlp.experts.gate_up" else whole  # theirs is [E, 2F, D]
    return found


@pytest.fixture
def world() -> World:
    return start_world(tiny())


@pytest.mark.parametrize("tied", [False, True])
def test_the_rival_has_the_same_parameters(transformers: ModuleType, world: World, tied: bool) -> None:
    config = tiny(tie_embeddings=tied)
    ours, theirs = NativeEngine(config, world).model, build_mixtral(transformers, config)
    assert sum(p.numel() for _, p in ours.named_parameters()) == sum(p.numel() for p in theirs.parameters())
    assert theirs.config._experts_implementation == "grouped_mm"


def test_the_rival_takes_the_same_step(transformers: ModuleType, world: World) -> None:
    """From the same weights on the same batch of two micro-batches: the same cross entropy and (no balance loss) gradient norm."""
    config = tiny()
    router = config.model.router.model_copy(update={"balance_weight": 0.0})
    config = config.model_copy(update={"model": config.model.model_copy(update={"router": router})})
    ours, theirs = NativeEngine(config, world), Mixtral(transformers, config, world)
    missing = theirs.model.load_state_dict(copied(ours.model), strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    batch, marks = RandomRows(config, world).next_step(), []
    result = ours.forward_backward(batch)
    loss = theirs.forward_backward(batch, marks.append)
    assert marks == ["forward", "backward"] * 2
    assert loss == pytest.approx(result.cross_entropy, rel=1e-5)
    before = [p.detach().clone() for p in theirs.model.parameters()]
    assert theirs.step() == pytest.approx(ours.step(), rel=1e-4)
    assert not any(torch.equal(a, b) for a, b in zip(before, theirs.model.parameters(), strict=True))


def test_what_the_rival_has_not(transformers: ModuleType, world: World) -> None:
    config = tiny(shared_expert_size=8, num_dense_layers=1, qk_norm=True)
    with pytest.raises(UserError, match="3 problem") as caught:
        Mixtral(transformers, config, world)
    assert all(
        key in str(caught.value) for key in ("model.shared_expert_size=8", "model.num_dense_layers=1", "model.qk_norm=True")
    )
