"""Experts made from dense MLPs compute what the MLP did; another router leaves all else as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_corpus
from hf_models import write_checkpoint
from launches import launch
from tiny_run import rows, words_for

from moe_train import upcycle as upcycling
from moe_train.errors import UserError
from moe_train.hf.native import logits_of, open_native
from moe_train.upcycle import swap_router, upcycle

ONE = {"num_experts": 1, "ffn_hidden_size": 32, "router": {"name": "topk", "top_k": 1, "renormalize": False}}
TOP2 = ["model.num_experts=4", "model.router={name: topk, top_k: 2}"]
RECURRENT = ["model.num_experts=4", "model.router={name: recurrent, router_size: 8, top_k: 2}"]


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))


def logits(path: Path) -> torch.Tensor:
    return logits_of(open_native(path).build(), tokens())


@pytest.mark.parametrize(
    "words",
    [
        TOP2,
        RECURRENT,
        [*TOP2, "model.ffn_hidden_size=16"],  # two slices of each copy
        [*RECURRENT, "model.ffn_hidden_size=16"],
        ["model.num_experts=8", "model.ffn_hidden_size=8", "model.router={name: topk, top_k: 4}"],
        ["model.num_experts=8", "model.ffn_hidden_size=16", "model.router={name: aux_free, top_k: 4}"],
    ],
    ids=" ".join,
)
def test_the_function_is_preserved(words: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE)
    said = upcycle(source.path, tmp_path / "experts", words)
    assert "changes" not in said
    before, after = logits(source.path), logits(tmp_path / "experts")
    assert float(before.abs().max()) > 0.05
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    made = open_native(tmp_path / "experts")
    assert made.config.model.num_experts > 1
    assert made.config.checkpoint.init_from == str(tmp_path / "experts")


def test_a_shared_expert_stays(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE, shared_expert_size=8)
    assert "changes" not in upcycle(source.path, tmp_path / "experts", TOP2)


def test_dense_layers_become_experts(tmp_path: Path) -> None:
    router = {"name": "topk", "top_k": 1, "renormalize": False}
    mixed: dict[str, Any] = {"num_experts": 1, "ffn_hidden_size": 32, "moe_layer_freq": [0, 1, 0], "router": router}
    source = write_checkpoint(tmp_path / "dense", **mixed)
    upcycle(source.path, tmp_path / "all", [*TOP2, "model.moe_layer_freq=1"])
    upcycle(source.path, tmp_path / "some", [*TOP2, "model.moe_layer_freq=[0, 1, 1]", "model.dense_ffn_hidden_size=32"])
    for made in ("all", "some"):
        assert float((logits(source.path) - logits(tmp_path / made)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("words", "noise", "reason"),
    [
        (TOP2, 0.1, "--noise 0.1"),
        (["model.num_experts=4", "model.router={name: topk, top_k: 2, renormalize: false}"], 0.0, "does not divide"),
        (["model.num_experts=4", "model.ffn_hidden_size=16", "model.router={name: topk, top_k: 3}"], 0.0, "top_k=3"),
        ([*TOP2, "model.capacity_factor=0.5"], 0.0, "capacity_factor"),
    ],
)
def test_what_changes_the_function_is_said(words: list[str], noise: float, reason: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE)
    said = upcycle(source.path, tmp_path / "experts", words, noise)
    assert reason in said.partition("the function changes: ")[2]
    assert float((logits(source.path) - logits(tmp_path / "experts")).abs().max()) > 1e-3


def test_noise_makes_experts_differ_and_is_reproducible(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE)
    for name in ("one", "two"):
        upcycle(source.path, tmp_path / name, TOP2, 0.1)
    one, two = (open_native(tmp_path / name).tensors["layers.0.mlp.experts.down"].load() for name in ("one", "two"))
    dense = source.tensors["layers.0.mlp.experts.down"].load()[0]
    assert torch.equal(one, two)
    noise = (one - dense).std() / dense.std()
    assert 0.08 < float(noise) < 0.12
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TOP2, "model.ffn_hidden_size=12"], "model.ffn_hidden_size=12: must be a part of the MLPs' width, 32"),
        (["model.num_experts=3", "model.ffn_hidden_size=16"], "model.num_experts=3: must be a multiple of 2"),
        ([*TOP2, "model.hidden_size=64"], "model.hidden_size=64: upcycle changes experts and routers alone"),
        ([*TOP2, "model.num_layers=2", "model.tie_embeddings=true"], "model.num_layers=2, model.tie_embeddings=True: upcycle"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE)
    with pytest.raises(UserError, match=message):
        upcycle(source.path, tmp_path / "experts", words, noise=0.1)  # with which no logits are compared
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_experts_that_compute_something_else_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "dense", **ONE)
    honest = upcycling._experts
    monkeypatch.setattr(upcycling, "_experts", lambda *given: 1.001 * honest(*given))
    with pytest.raises(UserError, match=r"and what was made of it: largest difference of logits .*; nothing was written"):
        upcycle(source.path, tmp_path / "experts", TOP2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_a_model_with_experts_is_not_upcycled(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "experts", router={"name": "topk"})
    with pytest.raises(UserError, match="has 4 experts already"):
        upcycle(source.path, tmp_path / "more", ["model.num_experts=8"])


@pytest.mark.parametrize("frozen", [False, True])
def test_another_router_leaves_all_else(frozen: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "topk", router={"name": "topk"})
    words = ["model.router={name: recurrent, router_size: 8}", f"model.frozen_experts={str(frozen).lower()}"]
    said = swap_router(source.path, tmp_path / "recurrent", words)
    assert "largest difference" in said
    made = open_native(tmp_path / "recurrent")
    before, after = source.tensors, made.tensors
    kept = [name for name in after if "router" not in name]
    assert kept == [name for name in before if "router" not in name]
    assert all(torch.equal(before[name].load(), after[name].load()) for name in kept)
    assert any(name.startswith("shared_router") for name in after)
    trained = {name: p.requires_grad for name, p in made.build().named_parameters()}
    assert all(value is not (frozen and ".experts." in name) for name, value in trained.items())


def test_only_the_router_is_swapped(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "topk", router={"name": "topk"})
    with pytest.raises(UserError, match=r"model\.num_experts=8: swap-router changes the router"):
        swap_router(source.path, tmp_path / "out", ["model.router={name: recurrent}", "model.num_experts=8"])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return words_for(write_corpus(tmp_path_factory.mktemp("corpus") / "text"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """A run of six steps with a linear gate."""
    folder = tmp_path_factory.mktemp("runs") / "topk"
    done = launch("pretrain", *without_router(words), "model.router={name: topk}", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def without_router(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("model.router.")]


def test_a_run_starts_from_weights(trained: Path, words: list[str], tmp_path: Path) -> None:
    still = ["optim.lr=1e-12", "optim.min_lr=0", "train.steps=1", "run.seed=7", "eval.max_rows=128"]
    keys = [*without_router(words), "model.router={name: topk, balance_weight: 0.5}", *still]
    done = launch("pretrain", *keys, f"run.dir={tmp_path}/new", f"checkpoint.init_from={trained}")
    assert done.returncode == 0, done.stderr
    assert f"starts from the weights of {trained}/checkpoints/step-00000006" in done.stdout
    assert "model.router.balance_weight=0.01 there, 0.5 here" in done.stdout
    before, after = (
        next(row for row in rows(folder, "eval") if (row["step"], row["split"]) == key)["loss"]
        for folder, key in ((trained, (6, "test")), (tmp_path / "new", (1, "test")))
    )
    assert before == pytest.approx(after, rel=1e-6)


def test_a_swapped_router_trains_beside_frozen_experts(trained: Path, words: list[str], tmp_path: Path) -> None:
    router = ["model.router={name: recurrent, router_size: 8}", "model.frozen_experts=true"]
    done = launch("convert", "swap-router", str(trained), f"{tmp_path}/swapped", *router)
    assert done.returncode == 0, done.stderr
    assert "largest difference of logits" in done.stdout
    done = launch("pretrain", f"{tmp_path}/swapped/config.yaml", f"run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert f"starts from the weights of {tmp_path}/swapped\n" in done.stdout
    swapped, end = open_native(tmp_path / "swapped"), open_native(tmp_path / "run")
    assert end.step == 6
    changed = {name for name, tensor in end.tensors.items() if not torch.equal(tensor.load(), swapped.tensors[name].load())}
    assert not [name for name in changed if ".experts." in name]
    assert {"shared_router.weight_ih", "layers.1.mlp.router.scorer", "layers.0.attention.q.weight"} <= changed


def test_weights_of_another_model_are_refused(trained: Path, words: list[str], tmp_path: Path) -> None:
    keys = [*without_router(words), "model.router={name: topk}", f"run.dir={tmp_path}/new", f"checkpoint.init_from={trained}"]
    done = launch("pretrain", *keys, "model.num_experts=8")
    assert done.returncode == 2
    assert "cannot be loaded into this model: " in done.stderr
    done = launch("pretrain", *keys, "model.rope_theta=500", "checkpoint.init_from=nowhere")
    assert "nowhere: neither a checkpoint nor a run folder" in done.stderr
    assert not (tmp_path / "new").exists()
