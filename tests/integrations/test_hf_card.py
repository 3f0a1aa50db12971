"""The model card of an exported run says what its checkpoint, config and metrics say."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from corpora import write_corpus
from launches import launch
from tiny_run import rows, words_for

from moe_train.checkpoint.logical import logical_tensors
from moe_train.checkpoint.manifest import read_manifest
from moe_train.hf.exporting import to_hf
from moe_train.hf.native import Native, empty_decoder, open_native

pytestmark = pytest.mark.integration

# Router, and how many numbers of a layer's router a token multiplies with; D 32, 4 experts, recurrent routers of 8.
ROUTERS: dict[str, tuple[list[str], int]] = {
    "topk": (["model.router.name=topk", "model.router.top_k=2"], 32 * 4),
    "recurrent": (["model.router.top_k=3"], 0),
}


@pytest.fixture(scope="module", params=ROUTERS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Native, Path, dict[str, str]]:
    """A run of six steps that is exported at step 4, and the rows of its card."""
    folder = tmp_path_factory.mktemp("card")
    words = [*words_for(write_corpus(folder / "text")), *ROUTERS[request.param][0], f"run.dir={folder / 'run'}"]
    done = launch("pretrain", *words, "eval.every=2", "sample.max_tokens=0", "checkpoint.keep_last=3")
    assert done.returncode == 0, done.stderr
    native = open_native(folder / "run" / "checkpoints" / "step-00000004")
    to_hf(native.path, folder / "hf")
    card = (folder / "hf" / "README.md").read_text()
    return native, folder, dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", card, re.MULTILINE))


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_parameters(exported: tuple[Native, Path, dict[str, str]]) -> None:
    """All of the checkpoint's but buffers; of the active ones, `top_k` experts, no norms, and the embedding as the head alone."""
    native, _, card = exported
    model = native.config.model
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in logical_tensors(native.path)}
    parameters = {name for name, _ in empty_decoder(native.config).named_parameters()}
    total, active = numbers(card["parameters"])
    assert total == sum(size for name, size in sizes.items() if name in parameters)
    active_by_hand = 0
    for name in parameters:
        if name.startswith("embedding") or len(read_manifest(native.path)["tensors"][f"model.{name}"].shape) < 2:
            continue
        if ".experts." in name:
            active_by_hand += sizes[name] * model.router.top_k // model.num_experts
        elif "router" not in name:
            active_by_hand += sizes[name]
    router = ROUTERS[model.router.name][1] * model.num_layers
    assert active == active_by_hand + router or (not router and active > active_by_hand)


def test_training(exported: tuple[Native, Path, dict[str, str]]) -> None:
    native, folder, card = exported
    manifest = read_manifest(native.path)
    config = manifest["config"]
    router = config["model"]["router"]
    tokens = manifest["step"] * config["train"]["global_batch_size"] * config["train"]["seq_len"]
    assert numbers(card["trained"]) == [4, 6, tokens, config["train"]["seq_len"]]
    assert tokens == 4 * 8 * 32
    assert card["router"] == f"`{router['name']}`, {router['top_k']} of {config['model']['num_experts']} experts"
    assert numbers(card["layers, width"]) == [config["model"]["num_layers"], config["model"]["hidden_size"]]
    assert card["tokenizer"] == f"bytes, 257 of {config['model']['vocab_size']} ids"
    assert card["data"] == f"`{folder / 'text'}`"


def test_evaluations(exported: tuple[Native, Path, dict[str, str]]) -> None:
    """The newest of each split, and none of a later step."""
    _, folder, card = exported
    found = {row["split"]: row for row in rows(folder / "run", "eval") if row["step"] <= 4}
    assert found["valid"]["step"] == 4
    assert {key for key in card if ", step " in key} == {f"{split}, step {row['step']}" for split, row in found.items()}
    for split, row in found.items():
        said = f"loss {row['loss']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte"
        assert card[f"{split}, step {row['step']}"] == said


def test_the_run(exported: tuple[Native, Path, dict[str, str]]) -> None:
    native, folder, _ = exported
    shown = json.loads(re.findall(r"```json\n(.*?)\n```", (folder / "hf" / "README.md").read_text(), re.DOTALL)[0])
    config = read_manifest(native.path)["config"]
    assert shown.keys() == {"model", "data", "train", "optim"}
    for section in shown:
        changed = {key for key in shown[section] if shown[section][key] != config[section][key]}
        assert changed <= {"device", "dtype", "recompute", "compile"}, section  # how it is opened here
