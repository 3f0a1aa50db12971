"""The command that tells whether layouts compute the same."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from corpora import write_corpus
from layouts import BASE

from moe_train import verify
from moe_train.cli import load_run, merge
from moe_train.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("verify")
    prefix = write_corpus(folder / "corpus")
    data = {"train": prefix, "valid": prefix, "test": prefix}
    content = merge(BASE, {"model": {"num_layers": 2}, "train": {"steps": 1, "dtype": "auto", "device": "auto"}, "data": data})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def run() -> Callable[[list[str]], None]:
    return runpy.run_path(str(ROOT / "launch" / "verify.py"))["run"]


def test_it_prints_what_differs(config: str, run: Callable, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run([config, "pp=2,pp_layers=[1,1]", "model.num_experts=2", "tp=2,train.recompute=full"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[0].startswith("1 steps of ")
    assert "fp32" in lines[0]
    assert [(line.split()[0], line.split()[1], line.split()[-1]) for line in lines[3:]] == [
        ("pp=2,pp_layers=[1,1]", "2", "PASS"),
        ("tp=2,train.recompute=full", "2", "PASS"),
    ]


def test_a_difference_fails(config: str, run: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.LIMITS["fp32"], "weights", -1.0)
    with pytest.raises(SystemExit) as ended:
        run([config, "dp_shard=2"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "FAIL" in out
    assert "    weights/" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tp=3"], "model.num_heads=4: must be a multiple of parallel.tp=3"),
        (["tq=2"], "parallel.tq: unknown key"),
        (["ep"], "parallel.ep"),
        (["dp_shard=8"], "train.global_batch_size=8: must be a multiple of"),
        (["train.dtype=bf16"], "train.dtype=bf16"),
        (["train.dtype=fp64"], "kernels.backend"),
    ],
)
def test_what_cannot_be_compared_is_said(words: list[str], message: str, config: str, run: Callable) -> None:
    with pytest.raises(UserError) as error:
        run([config, *words])
    assert message in str(error.value)


def test_usual_layouts_for_a_number_of_cores(config: str) -> None:
    run = load_run(config, ["parallel.tp=2", "parallel.ep=2", "train.micro_batch_size=4"])
    trials = verify.usual(verify.prepare(run), 2)
    tried = {trial.layout: trial.ranks for trial in trials if isinstance(trial, verify.Trial)}
    assert next(iter(tried)) == "tp=2,ep=2"  # the config's own, though it needs four ranks
    assert tried.pop("tp=2,ep=2") == 4
    assert set(tried.values()) == {2}
    assert any("dp_replicate=2" in str(refused) for refused in trials if isinstance(refused, UserError))  # 4 ranks x 4 rows > 8


def test_an_epsilon_that_lets_rounding_decide_is_raised(config: str) -> None:
    assert verify.prepare(load_run(config, ["optim.eps=1e-8"])).optim.eps == verify.EPS
    assert verify.prepare(load_run(config, ["optim.eps=1e-2"])).optim.eps == 1e-2
