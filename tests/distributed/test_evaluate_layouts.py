"""What is measured of a model depends neither on the layout that saved it nor on the one that measures it."""

from pathlib import Path
from typing import Any

import pytest
from corpora import write_corpus
from layouts import tiny
from ranks import run_ranks

from moe_train import verify
from moe_train.checkpoint import dcp
from moe_train.cli import dump, parse
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.engine.model import Model
from moe_train.evaluate import CONFIG_FILE, TOKENIZER_FILE, restore
from moe_train.evaluate.likelihood import Pair, likelihoods
from moe_train.evaluate.text import Reading, evaluate_text
from moe_train.parallel.mesh import start_world

RUN = tiny({"name": "recurrent", "router_size": 8})
SAVED = {"one": "", "dp2": "dp_shard=2", "tp2": "tp=2"}
MEASURED = {"dp2": [], "tp2": ["tp=2"], "cp2": ["cp=2"], "pp2": ["pp=2"]}
PAIRS = [Pair(list(b"def x"), list(b" = y")), Pair([256], list(b"a")), Pair(list(b"self"), list(b".x(y)")), Pair([7], [8])]


def save(layout: str, folder: Path) -> None:
    """A checkpoint of the model's first weights, which depend on names alone."""
    config = verify.lay_out(parse(RUN, "run"), layout).config
    model = Model(config, start_world(config)).materialise()
    ByteTokenizer().save(folder / TOKENIZER_FILE)
    files = {CONFIG_FILE: dump(config).encode(), TOKENIZER_FILE: (folder / TOKENIZER_FILE).read_bytes()}
    dcp.save(folder / "checkpoints", 0, {"model": model.state_dict()}, {}, files)


def measure(folder: Path, overrides: list[str], prefix: str) -> dict[str, Any]:
    """Figures of a text, also with a stride, and likelihoods in batches that leave a rank without one."""
    restored = restore(folder, [f"parallel.{word}" for word in overrides])
    readings = (Reading(), Reading(stride=48))
    texts = [evaluate_text(restored, prefix, reading, folder) for reading in readings]
    return {"texts": texts, "pairs": likelihoods(restored.model, PAIRS, 64, batch_size=3)}


def on_two_ranks(folder: Path, prefix: str) -> dict[str, Any]:
    """Save under two layouts; measure the checkpoint of one process under four."""
    for name in ("dp2", "tp2"):
        save(SAVED[name], folder / name)
    return {name: measure(folder / "one", words, prefix) for name, words in MEASURED.items()}


def test_every_layout_gives_the_same_figures(one_rank: None, tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", documents=5)
    for name in SAVED:
        (tmp_path / name).mkdir()
    save("", tmp_path / "one")
    expected = measure(tmp_path / "one", [], prefix)
    assert expected["texts"][0]["labels"].keys() == {"a", "b"}
    assert expected["texts"][1]["nats"] != expected["texts"][0]["nats"]
    ranks = run_ranks(2, on_two_ranks, tmp_path, prefix)
    measured = {f"by {name}": found for rank in ranks for name, found in rank.items()}
    measured |= {f"of {name}": measure(tmp_path / name, [], prefix) for name in ("dp2", "tp2")}
    for name, found in measured.items():
        for ours, theirs in zip(expected["texts"], found["texts"], strict=True):
            assert flat(theirs) == pytest.approx(flat(ours), rel=1e-5), name
        for one, other in zip(expected["pairs"], found["pairs"], strict=True):
            assert other.log_probability == pytest.approx(one.log_probability, rel=1e-5), name
            assert other.greedy == one.greedy, name
    assert ranks[0] == ranks[1]


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """Figures of all labels under one name each."""
    labels = figures.get("labels", {})
    rows = {f"{label}.{key}": value for label, row in labels.items() for key, value in row.items()}
    return rows | {key: value for key, value in figures.items() if key != "labels"}
