"""The same losses on any number of data-parallel ranks, over more steps than the proof of layouts takes."""

import pytest
from corpora import write_corpus
from ranks import run_ranks

from moe_train import routers
from moe_train.cli import parse

SCOPES = ["sequence", "micro_batch", "global_batch"]
ROUTERS = [{"name": "topk"}, *({"name": "recurrent", "router_size": 16, "balance_scope": scope} for scope in SCOPES)]
STEPS = 20


def tiny(prefix: str, **sections: dict) -> dict:
    model = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "num_experts": 4, "ffn_hidden_size": 32, "vocab_size": 320}
    content = {
        "model": model,
        "data": {"train": prefix, "valid": prefix, "test": prefix},
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": 32, "device": "cpu"},
        "optim": {"warmup_steps": 2, "lr": 1e-2},
        "kernels": {"backend": "torch"},
    }
    # In fp32 the rounding of a sum in another order sends a token that is nearly torn between two experts the other way, once in
    # so many steps (2e-5 of a loss was seen); in fp64 there is no such excuse.
    content["train"]["dtype"] = "fp64"
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return content


def losses(content: dict) -> list[float]:
    """The training losses of a run, as every rank reports them."""
    from moe_train.data.loader import Loader
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world

    config = parse(content, "test")
    world = start_world(config)
    engine = NativeEngine(config, world)
    loader = Loader(
        config.data.train,
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=config.train.global_batch_size,
        seed=0,
        dp_rank=world.rank,
        dp_size=world.size,
    )
    found = []
    for _ in range(config.train.steps):
        found.append(engine.forward_backward(loader.next_step()).loss)
        engine.step()
    return found


def all_losses(contents: list[dict]) -> list[list[float]]:
    assert routers.registry()
    return [losses(content) for content in contents]


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "train")
    return [tiny(prefix, model={**tiny(prefix)["model"], "router": router}) for router in ROUTERS]


@pytest.fixture(scope="module")
def one_rank(contents: list[dict]) -> list[list[float]]:
    return run_ranks(1, all_losses, contents)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_do_not_change_losses(size: int, contents: list[dict], one_rank: list[list[float]]) -> None:
    for found in run_ranks(size, all_losses, contents):
        for content, expected, actual in zip(contents, one_rank, found, strict=True):
            assert actual == pytest.approx(expected, rel=1e-10), content["model"]["router"]


def test_training_lowers_the_loss(one_rank: list[list[float]]) -> None:
    for found in one_rank:
        assert found[-1] < 0.6 * found[0]
