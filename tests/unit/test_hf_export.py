"""What can be exported and what is refused, without transformers."""

import ast
import errno
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_models import write_checkpoint
from launches import launch
from models import config_of

from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.hf import remote
from moe_train.hf.folders import whole_folder
from moe_train.hf.native import open_native
from moe_train.hf.stock import find_stock
from moe_train.routers import registry


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_router_is_exported_or_refused_by_name(name: str) -> None:
    assert (name in remote.EXPORTABLE) != (name in remote.REFUSED)
    model = config_of({"name": name}).model
    if name in remote.EXPORTABLE:
        remote.check_exportable(model)
        tree = ast.parse(remote.modeling_code(name))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [module for module in imported if module.startswith(("moe_", "pydantic"))]
    else:
        with pytest.raises(UserError, match=f"model.router.name={name}: is not exported: .*; use launch/evaluate.py"):
            remote.check_exportable(model)


def test_the_modeling_file_is_written_alone(tmp_path: Path) -> None:
    """launch/convert.py modeling."""
    lines = remote.write_modeling("recurrent", tmp_path / "modeling.py")
    written = (tmp_path / "modeling.py").read_text()
    assert written == remote.modeling_code("recurrent")
    assert len(written.splitlines()) == lines
    with pytest.raises(UserError, match="smear: has no modeling file; the routers that have one are topk, recurrent"):
        remote.write_modeling("smear", tmp_path / "other.py")
    assert not (tmp_path / "other.py").exists()
    with pytest.raises(UserError, match=r"modeling.py: is there already; choose another file"):
        remote.write_modeling("topk", tmp_path / "modeling.py")
    assert (tmp_path / "modeling.py").read_text() == written
    with pytest.raises(UserError, match=r"cannot be written: .*; make it a folder that can be written, or choose another OUT"):
        remote.write_modeling("topk", tmp_path / "modeling.py" / "inside.py")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["to-hf", "--noise=1"], "to-hf takes no --noise"),
        (["from-hf", "--remote-code"], "from-hf takes no --remote-code"),
        (["upcycle", "--tokenizer=bytes"], "upcycle takes no --tokenizer"),
        (["swap-router", "--tolerance=0.1"], "swap-router takes no --tolerance"),
        (["modeling", "--memory=x"], "modeling takes no --memory"),
        (["upcycle", "--noise=inf"], "--noise must be a number"),
    ],
)
def test_options_of_another_verb_are_refused(words: list[str], parts: str) -> None:
    done = launch("convert", words[0], "source", "out", *words[1:])
    assert done.returncode == 2
    assert parts in done.stderr


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("model.hidden_size=16", r"embedding.weight is \[320, 32\], and \[320, 16\] in"),
        ("model.num_layers=2", "layers.2.* is .*, and not there in"),
        ("model.num_layers=4", "layers.3.* is not there, and .* in"),
    ],
)
def test_weights_of_another_model_than_the_overrides_say(word: str, found: str, tmp_path: Path) -> None:
    """A layer without a place would be left out of an export, and its logits would agree."""
    source = write_checkpoint(tmp_path / "source", router={"name": "recurrent", "router_size": 8})
    with pytest.raises(UserError, match=f"{found} the model of the config; leave out the keys of model"):
        open_native(source.path, [word]).build()


@pytest.mark.parametrize(
    ("router", "model", "key"),
    [
        ({"name": "acmoe", "causal": False}, {}, "causal=false"),
        ({"name": "expert_choice", "causal": False}, {}, "causal=false"),
        ({"name": "recurrent"}, {"capacity_factor": 1.0}, "model.capacity_factor=1.0"),
        ({"name": "topk"}, {"block": "transformer_xl"}, "model.block=transformer_xl"),
        ({"name": "recurrent"}, {"num_classes": 2}, "model.num_classes=2"),
    ],
)
def test_models_that_cannot_be_exported(router: dict[str, Any], model: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        remote.check_exportable(config_of(router, **model).model)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({}, "MixtralForCausalLM"),
        ({"qk_norm": True}, "Qwen3MoeForCausalLM"),
        ({"qk_norm": "width"}, "OlmoeForCausalLM"),
        ({"num_experts": 1}, "LlamaForCausalLM"),
        ({"num_experts": 1, "qk_norm": True}, "Qwen3ForCausalLM"),
        ({"num_experts": 1, "qk_norm": "width"}, "OlmoeForCausalLM"),
    ],
)
def test_qk_norm_and_experts_decide_the_architecture(model: dict[str, Any], name: str) -> None:
    router = {"name": "topk"} | ({"top_k": 1, "renormalize": False} if "num_experts" in model else {})
    assert find_stock(config_of(router, **model).model).class_name == name


@pytest.mark.parametrize(
    ("router", "model", "key"),
    [
        ({"scores": "sigmoid"}, {}, "model.router.scores=sigmoid"),
        ({"renormalize": False}, {}, "model.router.renormalize=False"),
        ({"bias": True}, {}, "model.router.bias=True"),
        ({}, {"block": "transformer_xl"}, "model.block=transformer_xl"),
        ({"num_groups": 2}, {"qk_norm": True}, "model.router.num_groups=2"),
        ({}, {"shared_expert_size": 8}, "model.shared_expert_size=8"),
        ({}, {"num_dense_layers": 1}, "model.num_dense_layers=1"),
        ({}, {"moe_layer_freq": 2, "qk_norm": "width"}, "model.moe_layer_freq=2"),
        ({}, {"head_dim": 4, "qk_norm": "width"}, "model.head_dim=4"),
        ({}, {"capacity_factor": 2.0}, "model.capacity_factor=2.0"),
        ({}, {"num_classes": 2}, "model.num_classes=2"),
    ],
)
def test_settings_without_a_place_are_named(router: dict[str, Any], model: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        find_stock(config_of({"name": "topk"} | router, **model).model)


def test_qk_norm_over_the_width_refuses_tensor_parallelism() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=2: splits the heads"):
        parse({"model": {"qk_norm": "width"}, "parallel": {"tp": 2}}, "test")


def _fill(folder: Path) -> None:
    (folder / "file").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out: cannot be written: No space"), whole_folder(tmp_path / "out") as work:
        _fill(work)
    with pytest.raises(UserError, match="out: cannot be written: No such file"), whole_folder(tmp_path / "out") as work:
        safetensors.torch.save_file({"x": torch.zeros(1)}, work / "nowhere" / "file")  # no OSError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a bug"), whole_folder(tmp_path / "out"):
        raise ValueError("a bug")
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as work:
        (work / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is there already"), whole_folder(tmp_path / "out"):
        pass


def test_a_checkpoint_is_written_whole(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "out", router={"name": "topk"}, qk_norm="width")
    assert native.step == 0
    assert native.tensors["layers.0.attention.q_norm.weight"].shape == (32,)
    assert native.tensors["layers.0.attention.k_norm.weight"].shape == (16,)
