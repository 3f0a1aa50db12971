"""Checkpoints that were damaged or forged: a run resumes from what was saved, or is refused with one message."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoints import reseal
from corpora import write_corpus
from damage import NUMBERS, damaged, examples, outcome, plan
from hypothesis import given
from hypothesis import strategies as st
from models import TINY

from moe_train.checkpoint import dcp
from moe_train.cli import parse
from moe_train.evaluate import restore
from moe_train.parallel.mesh import start_world
from moe_train.pretraining import pretraining, settle_vocabulary
from moe_train.train import Trainer, train

STEP = 2
JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from([-1, *NUMBERS, 10**30]) | st.floats() | st.text(max_size=8) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@dataclass
class Saved:
    """A run of two steps, its trainer, and the files of its checkpoint."""

    trainer: Trainer
    folder: Path
    files: dict[str, bytes]

    def write(self, files: dict[str, bytes]) -> Path:
        """Make `files` the checkpoint's content."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        return self.folder

    def open(self, how: str) -> None:
        """What launch/pretrain.py and launch/generate.py do with it."""
        if how == "resume":
            self.trainer.resume()
            assert self.trainer.engine.steps_done == STEP
        else:
            assert restore(self.folder).step == STEP


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    place = tmp_path_factory.mktemp("run")
    prefix = write_corpus(place / "text")
    content = {
        "run": {"dir": str(place / "run")},
        "model": {**TINY, "num_layers": 2, "vocab_size": 257, "router": {"name": "recurrent", "router_size": 8}},
        "data": {"train": prefix, "valid": prefix, "test": prefix, "tokenizer": "bytes"},
        "train": {"steps": STEP, "seq_len": 16, "global_batch_size": 2, "micro_batch_size": 2, "device": "cpu"},
        "sample": {"max_tokens": 0},
    }
    config, tokenizer = settle_vocabulary(parse(content, "run.yaml"))
    folder = train(config)
    try:
        [checkpoint] = dcp.checkpoints(folder / "checkpoints")
        world = start_world(config)
        config, feed = pretraining(config, world, tokenizer)
        trainer = Trainer(config, world, tokenizer, folder, feed)
        yield Saved(trainer, checkpoint, {path.name: path.read_bytes() for path in checkpoint.iterdir()})
    finally:
        dist.destroy_process_group()


HOW = st.sampled_from(["resume", "resume", "resume", "restore"])


def test_the_sound_checkpoint_is_read(saved: Saved) -> None:
    saved.write(saved.files)
    for how in ("resume", "restore"):
        assert outcome(lambda how=how: saved.open(how)) is None


@examples(30, 500)
def test_any_damage_is_noticed(saved: Saved, examples: int) -> None:
    """Whatever file is changed, cut, exchanged or removed."""
    names = sorted(saved.files)

    @plan(examples)
    @given(HOW, st.sampled_from(names), st.data())
    def attempt(how: str, name: str, data: st.DataObject) -> None:
        files = dict(saved.files)
        other = data.draw(st.sampled_from(["damage", "damage", "damage", "remove", *names]))
        if other == "damage":
            files[name] = data.draw(damaged(files[name]))
        elif other == "remove":
            del files[name]
        elif other in files:
            files[name], files[other] = files[other], files[name]
        saved.write(files)
        refused = outcome(lambda: saved.open(how)) is not None
        assert refused == (files != saved.files)

    attempt()


@examples(45, 1_000)
def test_forged_files(saved: Saved, examples: int) -> None:
    """The same with a manifest.json that agrees: it may be a model of other numbers, or must be refused."""

    @plan(examples)
    @given(HOW, st.sampled_from(sorted(saved.files)), st.data())
    def attempt(how: str, name: str, data: st.DataObject) -> None:
        files = saved.files | {name: data.draw(damaged(saved.files[name]))}
        if data.draw(st.integers(0, 9)) == 0:
            del files[data.draw(st.sampled_from(["config.yaml", "tokenizer", "rng.safetensors", "__0_0.distcp"]))]
        folder = saved.write(files)
        if name != "manifest.json":
            reseal(folder)
        outcome(lambda: saved.open(how))

    attempt()


@examples(30, 500)
def test_forged_states(saved: Saved, examples: int) -> None:
    """Any values in manifest.json, under a seal that is right."""
    state = json.loads(saved.files["manifest.json"])
    places = [("step",), ("files",), ("loader",), *(("loader", key) for key in state["loader"])]
    places += [("files", "config.yaml"), ("files", "config.yaml", "bytes"), ("loader", "data", 0), ("more",)]
    places += [("loader", "data", 0, key) for key in state["loader"]["data"][0]]
    tensor = ("tensors", "model.norm.weight")
    places += [("tensors",), tensor, *((*tensor, key) for key in ("shape", "dtype", "chunks")), (*tensor, "shape", 0)]
    places += [(*tensor, "chunks", 0), *((*tensor, "chunks", 0, i) for i in range(6)), ("config",), ("tokenizer",)]

    @plan(examples)
    @given(HOW, st.sampled_from(places), JSON, st.booleans())
    def attempt(how: str, place: tuple[Any, ...], value: Any, gone: bool) -> None:
        def edit(content: dict[str, Any]) -> dict[str, Any]:
            *above, last = place
            inner: Any = content
            for key in above:
                inner = inner[key]
            if gone and isinstance(inner, dict):
                inner.pop(last, None)
            else:
                inner[last] = value
            return content

        reseal(saved.write(saved.files), edit)
        outcome(lambda: saved.open(how))

    attempt()


def test_a_checkpoint_of_another_tokenizer_is_refused(saved: Saved) -> None:
    reseal(saved.write(saved.files), lambda content: content | {"tokenizer": "bytes-258"})
    message = str(outcome(lambda: saved.open("resume")))
    rule = f"not the one of {saved.folder}, whose ids mean something else"
    assert message == f"data.tokenizer=bytes: {rule}; give {saved.folder / 'tokenizer'}"


def test_a_checkpoint_is_named_in_the_message(saved: Saved) -> None:
    name = "__0_0.distcp"
    saved.write(saved.files | {name: saved.files[name][:-1]})
    message = str(outcome(lambda: saved.open("resume")))
    assert str(saved.folder) in message
    assert name in message
    assert "use another checkpoint" in message
