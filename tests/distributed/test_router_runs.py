"""Every registered router trains by its name alone, and goes on from a checkpoint as if it had never stopped."""

import traceback
from pathlib import Path
from typing import Any

import pytest
from corpora import write_corpus
from models import TINY
from ranks import run_ranks
from torch import Tensor

from moe_train import routers

NAMES = sorted(routers.registry())
STEPS, SAVED = 3, 2


def config_of(name: str, prefix: str, steps: int = STEPS) -> Any:
    """A run whose router is chosen by one word."""
    from moe_train.cli import load_run

    sizes = {**TINY, "num_layers": 2, "vocab_size": 320}
    words = [f"model.{key}={value}" for key, value in sizes.items()] + [
        f"data.{part}={prefix}" for part in ("train", "valid", "test")
    ]
    words += [
        f"train.steps={steps}",
        "train.seq_len=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.device=cpu",
    ]
    words += ["optim.lr=1e-2", "optim.warmup_steps=1", "data.tokenizer=bytes", f"model.router.name={name}"]
    return load_run("configs/quickstart.yaml", words)


def batches_of(config: Any, world: Any) -> list[Any]:
    from moe_train.data.loader import Loader

    shape = {"seq_len": 32, "micro_batch_size": 2, "global_batch_size": 4}
    loader = Loader(config.data.train, **shape, seed=0, dp_rank=world.rank, dp_size=world.size)
    return [loader.next_step() for _ in range(STEPS)]


def whole_run(name: str, prefix: str, folder: str) -> dict[str, Any]:
    """A run, and another one that takes up its checkpoint in the middle."""
    from moe_train.checkpoint import dcp
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world

    config = config_of(name, prefix)
    world = start_world(config)
    batches = batches_of(config, world)
    engine = NativeEngine(config, world)
    first = [take_step(engine, batch) for batch in batches[:SAVED]]
    dcp.save(Path(folder), SAVED, engine.state_dict(), {}, {})
    saved = values(engine)
    second = [take_step(engine, batch) for batch in batches[SAVED:]]
    again = NativeEngine(config, world)
    state = again.state_dict()
    dcp.load(Path(folder) / f"step-{SAVED:08d}", state)
    again.load_state_dict(state)
    again.steps_done = SAVED
    differ = [name for name, value in values(again).items() if not value.equal(saved[name])]
    resumed = [take_step(again, batch) for batch in batches[SAVED:]]
    steps = [*first, *second]
    moved = [name for _, names in steps for name in names]
    return {"losses": [loss for loss, _ in steps], "resumed": [loss for loss, _ in resumed], "differ": differ, "moved": moved}


def longer_run(name: str, prefix: str) -> tuple[list[str], list[str], list[str]]:
    """What is frozen after some steps of a run, what of it moves when a run of many more steps goes on, and what is frozen then."""
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world

    config = config_of(name, prefix)
    world = start_world(config)
    *first, last = batches_of(config, world)
    engine = NativeEngine(config, world)
    for batch in first:
        take_step(engine, batch)
    longer = NativeEngine(config_of(name, prefix, 1000 * STEPS), world)
    longer.load_state_dict(engine.state_dict())
    longer.steps_done = engine.steps_done
    frozen = frozen_in(longer)
    return frozen, take_step(longer, last)[1], frozen_in(longer)


def frozen_in(engine: Any) -> list[str]:
    frozen = {id(p) for router in engine.model.routers().values() for p in router.frozen()}
    return [name for name, p in engine.model.named_parameters() if id(p) in frozen]


def take_step(engine: Any, batch: Any) -> tuple[float, list[str]]:
    """The cross entropy of a step, and what moved in it although it is frozen."""
    names = [*frozen_in(engine), *(name for name, p in engine.model.named_parameters() if not p.requires_grad)]
    before = values(engine)
    loss = engine.forward_backward(batch).cross_entropy
    engine.step()
    after = values(engine)
    return loss, [name for name in names if not after[name].equal(before[name])]


def values(engine: Any) -> dict[str, Tensor]:
    """This rank's shards of parameters and buffers."""
    state = engine.state_dict()["model"]
    return {name: (v.to_local() if hasattr(v, "to_local") else v).clone() for name, v in state.items()}


def all_runs(prefix: str, folder: str) -> dict[str, Any]:
    found = {}
    for name in NAMES:
        try:
            found[name] = whole_run(name, prefix, f"{folder}/{name}")
        except BaseException:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one rank", "two ranks"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "text")
    return run_ranks(request.param, all_runs, prefix, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_by_its_name_alone(name: str, runs: list[dict[str, Any]]) -> None:
    for run in (found[name] for found in runs):
        assert isinstance(run, dict), run
        assert run["losses"][-1] < run["losses"][0] - 0.2
        assert run["moved"] == []  # what is frozen is neither updated nor decayed


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_where_it_was_saved(name: str, runs: list[dict[str, Any]]) -> None:
    for run in (found[name] for found in runs):
        assert isinstance(run, dict), run
        assert run["differ"] == []
        assert run["resumed"] == run["losses"][SAVED:]


@pytest.mark.parametrize("name", [name for name, config in routers.registry().items() if config.freezes])
def test_what_was_frozen_stays_frozen_where_a_run_gets_more_steps(name: str, tmp_path: Path) -> None:
    """The share of training that is done falls then below the one from which on it is frozen."""
    [(frozen, moved, later)] = run_ranks(1, longer_run, name, write_corpus(tmp_path / "text"))
    assert frozen
    assert moved == []
    assert later == frozen
