"""Texts with classes: the published files' forms, what is said of wrong ones, and the measure."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moe_train.data.loader import MicroBatch
from moe_train.data.stream import NO_TARGET
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.engine.model import Model
from moe_train.errors import UserError
from moe_train.finetune import accuracy
from moe_train.finetune.accuracy import report_classes
from moe_train.finetune.examples import gather
from moe_train.finetune.labelled import class_names, encode_labelled, read_labelled, without_middle

BYTES = ByteTokenizer()
TREE = "(3 (2 It) (4 (2 's) (4 (3 (2 a) (4 -LRB-lovely-RRB-)) (2 -LRB-))))"


def write(path: Path, content: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return str(path)


def pairs(path: str) -> list[tuple[str, str]]:
    return [(one.text, one.label) for one in read_labelled(path)]


def test_the_forms_of_the_published_files(tmp_path: Path) -> None:
    sst2 = write(tmp_path / "train.tsv", 'sentence\tlabel\nhide "new secretions \t0\ncontains no wit\t1\n')
    assert pairs(sst2) == [('hide "new secretions ', "0"), ("contains no wit", "1")]
    assert pairs(write(tmp_path / "trees.txt", f"{TREE}\n\n(0 (1 No) (0 1\\/2))\n")) == [
        ("It 's a -LRB-lovely-RRB- (", "3"),
        ("No 1/2", "0"),
    ]
    sst5 = json.dumps({"text": "a stirring film", "label": 4, "label_text": "very positive"})
    assert pairs(write(tmp_path / "train.jsonl", sst5 + "\n")) == [("a stirring film", "4")]
    banking = 'text,category\n"I am waiting, still",card_arrival\nWhy?,exchange_rate\n'
    assert pairs(write(tmp_path / "banking.csv", banking)) == [
        ("I am waiting, still", "card_arrival"),
        ("Why?", "exchange_rate"),
    ]
    imdb = 'review,sentiment\n"One line.<br />\nTwo ""lines"".",positive\n'
    assert pairs(write(tmp_path / "imdb.csv", imdb)) == [('One line.<br />\nTwo "lines".', "positive")]
    for name, text in (("pos/0_9.txt", "Good."), ("neg/1_1.txt", "Bad."), ("neg/0_3.txt", "Poor."), ("unsup/0_0.txt", "?")):
        write(tmp_path / "aclImdb" / "train" / name, text)
    assert pairs(str(tmp_path / "aclImdb" / "train")) == [("Poor.", "neg"), ("Bad.", "neg"), ("Good.", "pos")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "x.tsv",
            "index\tsentence\n0\tx\n",
            r"x.tsv:2: none of the fields label, category, sentiment among 'index', 'sentence'",
        ),
        ("x.tsv", "sentence\tlabel\nx\t1\ty\n", r"x.tsv:2: 3 columns, where the header has 2 \(sentence, label\)"),
        ("x.csv", 'text,category\n"x"y,a\n', r"x.csv:2: not a table"),
        ("x.csv", 'text,category\n"x,a\n', r"x.csv:\d: not a table"),
        ("x.csv", "text,category\n ,a\n", r"x.csv:2: the text is empty"),
        ("x.csv", "text,category\nx,\n", r"x.csv:2: field 'category' must be a class"),
        ("x.jsonl", '{"text": "x", "label": 1.5}', r"x.jsonl:1: field 'label' must be a class, .* not 1.5"),
        ("x.jsonl", '{"text": "x", "label": true}', r"x.jsonl:1: field 'label' must be a class"),
        ("x.json", '[{"text": 1, "label": 1}]', r"x.json: entry 1: field 'text' must be text, not int"),
        ("x.txt", "plain words\n", r"x.txt:1: not a labelled tree"),
        ("x.txt", "(3 (2 It) (4 works)\n", r"x.txt:1: not a labelled tree"),
        ("x.parquet", "PAR1", r"not a .json or .jsonl file"),
        ("x/readme.md", "", r"has no folder for each class"),
    ],
)
def test_a_wrong_file_is_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=says):
        read_labelled(str(Path(path).parent) if "/" in name else path)


def test_classes_are_those_of_the_training_file(tmp_path: Path) -> None:
    texts = read_labelled(write(tmp_path / "x.tsv", "sentence\tlabel\na\t10\nb\t2\nc\tx\n"))
    assert class_names(texts, "here") == ["2", "10", "x"]
    with pytest.raises(UserError, match=r"here: holds 10 alone; a classifier needs two classes"):
        class_names(texts[:1], "here")
    with pytest.raises(UserError, match=r"x.tsv:4: class 'x' is none of the 2 of sft.train or sft.classes \(2, 10\)"):
        list(encode_labelled(texts, ["2", "10"], BYTES))


def test_the_class_is_predicted_at_the_end_of_the_text_however_long_it_is(tmp_path: Path) -> None:
    texts = read_labelled(write(tmp_path / "x.tsv", "sentence\tlabel\nabcdefgh\t1\nxy\t0\n"))
    found = gather(encode_labelled(texts, ["0", "1"], BYTES), Counter(), "x", 6, "truncate", without_middle)
    assert found.tokens.tolist() == [*b"abcde", BYTES.eod, *b"xy", BYTES.eod]
    assert found.targets.tolist() == [*[NO_TARGET] * 5, 1, NO_TARGET, NO_TARGET, 0]
    assert found.told == "x: 2 examples, 1 longer than 6 tokens truncated"


def test_a_confusion_counts_what_each_class_was_taken_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """True classes by row, predicted ones by column; places without a class count for nothing."""
    monkeypatch.setattr(accuracy.dist, "all_reduce", lambda counts: None)
    taken_for = torch.tensor([[0, 1], [0, 1], [1, 2], [2, 2], [NO_TARGET, 0]])
    output = SimpleNamespace(logits=5.0 * torch.nn.functional.one_hot(taken_for[:, 1], 3)[None])
    model = SimpleNamespace(
        train=lambda mode: None,
        reshard=lambda: None,
        world=SimpleNamespace(device=torch.device("cpu")),
        layout=SimpleNamespace(at=lambda axis: 0),
        batch_info=lambda micro: SimpleNamespace(context=lambda found: found),
        forward=lambda info, targets: output,
    )
    micro = SimpleNamespace(targets=taken_for[None, :, 0])
    counts, nats = accuracy.confusion(cast(Model, model), [cast(MicroBatch, micro)] * 2, 3)
    assert counts.tolist() == [[0, 4, 0], [0, 0, 2], [0, 0, 2]]
    assert nats == pytest.approx(2 * (4 * math.log(math.exp(5) + 2) - 5))


def test_figures_of_a_confusion() -> None:
    report = report_classes(torch.tensor([[3, 1], [0, 4]]), 4.0, ["neg", "pos"])
    assert (report["accuracy"], report["loss"], report["examples"]) == (7 / 8, 0.5, 8)
    assert report["classes"]["neg"] == {"examples": 4, "correct": 3, "predicted": 3}
    assert report["classes"]["pos"] == {"examples": 4, "correct": 4, "predicted": 5}
