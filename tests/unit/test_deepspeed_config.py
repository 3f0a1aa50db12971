"""What DeepSpeed cannot run is refused by name before anything starts, and so is a file of options that says what other keys say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config_of
from torch import nn

from moe_train import routers
from moe_train.cli import parse
from moe_train.config import Config
from moe_train.config.deepspeed import OWNED
from moe_train.engine.choose import make_engine
from moe_train.errors import UserError
from moe_train.model.decoder import Decoder
from moe_train.model.routing import Router, router_class
from moe_train.parallel.mesh import World
from moe_train.parallel.plain import compute_in

DEEPSPEED = {"name": "deepspeed"}


def run(engine: dict[str, Any], **sections: Any) -> Config:
    assert routers.registry()
    return parse({"engine": engine, "train": {"device": "cpu"}, **sections}, "test")


@pytest.mark.parametrize(
    ("engine", "sections", "words"),
    [
        (DEEPSPEED, {"parallel": {"tp": 2}}, ["parallel.tp=2", "engine.name=native"]),
        (DEEPSPEED, {"parallel": {"pp": 2}}, ["parallel.pp=2", "engine.name=native"]),
        (DEEPSPEED, {"parallel": {"cp": 2}}, ["parallel.cp=2", "engine.name=native"]),
        (DEEPSPEED, {"parallel": {"dp_replicate": 2}}, ["parallel.dp_replicate=2", "use 1"]),
        (DEEPSPEED, {"parallel": {"sharding": "parameters"}}, ["parallel.sharding=parameters", "engine.zero_stage=2"]),
        (DEEPSPEED | {"zero_stage": 3}, {"parallel": {"ep": 2}}, ["engine.zero_stage=3", "use 2, or parallel.ep=1"]),
        (DEEPSPEED | {"zero_stage": 0, "offload": "optimizer"}, {}, ["engine.offload=optimizer", "engine.zero_stage=1"]),
        (DEEPSPEED, {"train": {"dtype": "fp64"}, "kernels": {"backend": "torch"}}, ["train.dtype=fp64", "use fp32"]),
        (DEEPSPEED, {"train": {"compile": True}}, ["train.compile=True", "set it to false"]),
        (DEEPSPEED, {"model": {"router": {"name": "stablemoe"}}}, ["model.router.name=stablemoe", "engine.name=native"]),
        (DEEPSPEED | {"deepspeed_json": "/no/such.json"}, {}, ["engine.deepspeed_json=/no/such.json", "give another path"]),
        ({"zero_stage": 3}, {}, ["engine.zero_stage=3", "is for engine.name=deepspeed"]),
        ({"offload": "optimizer"}, {}, ["engine.offload=optimizer", "is for engine.name=deepspeed"]),
        ({"deepspeed_json": "x.json"}, {}, ["engine.deepspeed_json=x.json", "is for engine.name=deepspeed"]),
    ],
)
def test_what_cannot_run_is_refused(engine: dict[str, Any], sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        run(engine, **sections)
    line = next(line for line in str(error.value).splitlines() if words[0] in line)
    assert all(word in line for word in words)


@pytest.mark.parametrize("stage", range(4))
def test_stages_are_accepted(stage: int) -> None:
    assert run(DEEPSPEED | {"zero_stage": stage}).engine.zero_stage == stage


def test_memory_is_refused() -> None:
    model = {"block": "transformer_xl", "transformer_xl": {"attn_type": "relative"}}
    with pytest.raises(UserError, match=r"train\.memory=8: .*native engine only; set it to 0"):
        run(DEEPSPEED, model=model, train={"memory": 8}, data={"order": "contiguous"})


@pytest.mark.parametrize("path", OWNED)
def test_an_option_that_other_keys_own_is_refused(path: str, tmp_path: Path) -> None:
    section, _, key = path.rpartition(".")
    options = {section: {key: 1}} if section else {key: 1}
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    with pytest.raises(UserError) as error:
        run(DEEPSPEED | {"deepspeed_json": str(file)})
    assert f"engine.deepspeed_json: {path}=1: {OWNED[path]}; leave it out of the file" in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"zero_optimization": 3}', "[" * 100_000, "\xff", " " * 300_000])
def test_a_file_that_holds_no_options_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"engine\.deepspeed_json"):
        run(DEEPSPEED | {"deepspeed_json": str(file)})


def test_all_owned_options_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"fp16": {}, "optimizer": {}, "zero_optimization": {"stage": 1, "reduce_bucket_size": 1}}))
    with pytest.raises(UserError) as error:
        run(DEEPSPEED | {"deepspeed_json": str(file)})
    assert all(f"json: {path}=" in str(error.value) for path in ("fp16", "optimizer", "zero_optimization.stage"))
    assert "reduce_bucket_size" not in str(error.value)


@pytest.mark.parametrize("name", sorted(routers.registry()))
def test_a_router_that_freezes_says_so(name: str) -> None:
    kind = routers.registry()[name]
    assert kind.freezes == (router_class(kind()).frozen is not Router.frozen)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = run(DEEPSPEED)
    with pytest.raises(UserError, match=r"pip install 'moe_train\[deepspeed\]'") as error:
        make_engine(config, World(0, 1, torch.device("cpu"), torch.float32, ""))
    assert str(error.value).startswith("engine.name=deepspeed: deepspeed cannot be imported")
    assert "\n" not in str(error.value)


def test_parameters_read_in_the_compute_dtype_but_for_routers() -> None:
    config = config_of()
    from moe_kernels import get_backend

    model = Decoder(config.model, get_backend("torch"))
    names = dict(model.named_parameters())
    compute_in(model, torch.bfloat16)
    assert dict(model.named_parameters()) == names
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    read = {path: getattr(module, name).dtype for path, module, name in _owners(model)}
    wide = {path for path, dtype in read.items() if dtype == torch.float32}
    assert wide == {path for path in names if ".router." in path or path.startswith("shared_router.")}
    model.head.weight.sum().backward()
    assert names["head.weight"].grad.dtype == torch.float32


def _owners(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [
        (f"{path}.{name}", module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
