"""What a trained model's losses come to, counted by hand, and the likelihood of texts beside a plain forward pass."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import write_checkpoint
from launches import launch
from models import config_of

from moe_train.data.characters import CharacterTokenizer
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, train_sentencepiece
from moe_train.data.words import WordTokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError
from moe_train.evaluate import Restored, restore
from moe_train.evaluate.figures import TextCounts
from moe_train.evaluate.harness import harness_model, require_lm_eval
from moe_train.evaluate.likelihood import Pair, check_likelihood, likelihoods
from moe_train.evaluate.tasks import RMOE, summarise
from moe_train.evaluate.text import Reading, evaluate_text
from moe_train.hf.native import Native, logits_of
from moe_train.model.decoder import Decoder

ROUTER = {"name": "recurrent", "router_size": 8}
TEXT = "Größe  中文 naïve 😀!\nzwei\tWörter\n\nEnde"  # characters of one to four bytes
WIKI = " = Title = \n \n A sentence of words , and <unk> . \n"


@pytest.fixture
def native(one_rank: None, tmp_path: Path) -> Native:
    """A checkpoint whose windows have 12 tokens."""
    return write_checkpoint(tmp_path / "model", seq_len=12, router=ROUTER)


@pytest.fixture
def restored(native: Native) -> Restored:
    return restore(native.path)


@pytest.fixture
def uniform(one_rank: None, tmp_path: Path) -> Restored:
    """A model to which every token of 320 is as likely."""
    model = restore(write_checkpoint(tmp_path / "uniform", seq_len=12, router=ROUTER).path)
    with torch.no_grad():
        dict(model.model.named_parameters())["head.weight"].zero_()
    return model


def corpus(folder: Path, documents: list[tuple[str, str]], tokenizer: Tokenizer | None = None) -> str:
    """The prefix of a corpus of texts with labels."""
    with DatasetWriter(folder / "corpus", tokenizer or ByteTokenizer()) as writer:
        for text, label in documents:
            writer.add_text(text, label)
    return str(folder / "corpus")


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(["def", "return", "x", "self.y", "(", ")\n"]) for _ in range(count))


def nats_of(model: Decoder, ids: Any, first: int, context: int) -> list[float]:
    """What each token from `first` on costs after at most `context` tokens, one forward pass for each."""
    found = []
    for at in range(first, len(ids)):
        seen = torch.tensor([[int(i) for i in ids[max(at - context, 0) : at]]])
        scores = logits_of(model, seen)[0, -1].double().log_softmax(-1)
        found.append(-float(scores[int(ids[at])]))
    return found


# Counts


def tokenizers() -> list[Tokenizer]:
    lines = [f"{TEXT} {words(300, seed)}" for seed in range(3)]
    return [ByteTokenizer(), CharacterTokenizer.read([TEXT.encode()]), train_sentencepiece(lines, None, 340)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda t: t.name)
@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", "\n\n", " a", "x"], ids=repr)
def test_counts_are_those_of_the_text_behind_its_first_token(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.name == "characters" and not set(text.encode()) <= set(TEXT.encode()):
        pytest.skip("characters that the tokenizer has not")
    ids = torch.from_numpy(np.append(tokenizer.encode(text), tokenizer.eod).astype(np.int64))
    first = tokenizer.decode_bytes(ids[:1].tolist())
    size, characters, found_words, lines = TextCounts.of(tokenizer).count(ids[:-1], ids[1:]).sum(0).tolist()
    assert size == len(text.encode()) - len(first)
    assert characters == len(text) - (len(first) - sum(b & 0xC0 == 0x80 for b in first))
    assert found_words == len(text.split()) - len(first.split())
    assert lines == text.count("\n") + (not text.endswith("\n")) - first.count(b"\n")


def test_a_word_vocabulary_counts_what_transformer_xl_counts() -> None:
    tokenizer = WordTokenizer.read([WIKI.encode()])
    ids = torch.from_numpy(np.append(tokenizer.encode(WIKI), tokenizer.eod).astype(np.int64))
    _, _, found_words, lines = TextCounts.of(tokenizer).count(ids[:-1], ids[1:]).sum(0).tolist()
    assert found_words == len(WIKI.split()) - 1
    assert lines == 3
    assert found_words + lines == len(ids) - 1  # each token is a word or an end of a line: the published perplexity


# Texts


def test_figures_of_a_uniform_model_by_hand(uniform: Restored, tmp_path: Path) -> None:
    found = evaluate_text(uniform, corpus(tmp_path, [("aé\n中 b", "unknown")]), Reading(), tmp_path)
    # 9 bytes and the end of the document; nothing predicts the first byte, so 8 bytes are predicted and the end: 9 tokens.
    nats = 9 * math.log(320)
    assert (found["tokens"], found["bytes"], found["characters"], found["words"], found["lines"]) == (9, 8, 5, 2, 2)
    assert found["nats"] == pytest.approx(nats, rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert found["perplexity"] == pytest.approx(320, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(9 * math.log2(320) / 8, rel=1e-6)
    assert found["bits_per_character"] == pytest.approx(9 * math.log2(320) / 5, rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / 2), rel=1e-4)
    assert found["word_and_line_perplexity"] == pytest.approx(math.exp(nats / 4), rel=1e-5)
    assert "labels" not in found


def test_a_stride_of_a_whole_row_is_plain_evaluation(restored: Restored, tmp_path: Path) -> None:
    prefix = corpus(tmp_path, [(words(9, seed), "unknown") for seed in range(5)])
    plain = evaluate_text(restored, prefix, Reading(), tmp_path)
    assert evaluate_text(restored, prefix, Reading(stride=12), tmp_path) == plain


@pytest.mark.parametrize("stride", [1, 5])
def test_a_stride_gives_each_token_the_context_that_it_says(native: Native, stride: int, tmp_path: Path) -> None:
    text, seq_len, model = words(14), 12, native.build()
    ids = np.append(ByteTokenizer().encode(text), ByteTokenizer.eod)
    assert len(ids) > 3 * seq_len
    found = evaluate_text(restore(native.path), corpus(tmp_path, [(text, "unknown")]), Reading(stride=stride), tmp_path)
    expected = 0.0
    for at in range(
        1, len(ids)
    ):  # the token at `at` is predicted in the first row, or in one that starts a multiple of the stride later
        row = max(0, -(-(at - seq_len) // stride)) * stride
        expected += nats_of(model, ids[: at + 1], at, at - row)[0]
        assert at <= seq_len or seq_len - stride < at - row <= seq_len
    assert found["tokens"] == len(ids) - 1
    assert found["nats"] == pytest.approx(expected, rel=1e-5)
    plain = evaluate_text(restore(native.path), str(tmp_path / "corpus"), Reading(), tmp_path)
    assert abs(plain["nats"] - found["nats"]) > 1e-4 * expected


def test_labels_have_figures_of_their_own(native: Native, tmp_path: Path) -> None:
    documents = [("def x", "code"), ("Größe", "prose"), ("return", "code"), ("zz", "unknown")]
    found = evaluate_text(restore(native.path, ["train.seq_len=64"]), corpus(tmp_path, documents), Reading(), tmp_path)
    model = native.build()
    assert found["labels"].keys() == {"code", "prose", "unknown"}
    for label, row in found["labels"].items():
        texts = [text for text, its in documents if its == label]
        ids = [np.append(ByteTokenizer().encode(text), ByteTokenizer.eod) for text in texts]
        assert row["nats"] == pytest.approx(sum(sum(nats_of(model, document, 1, 64)) for document in ids), rel=1e-5)
        assert row["characters"] == sum(map(len, texts)) - len(texts)
    for key in ("nats", "tokens", "bytes", "words", "lines"):
        assert found[key] == pytest.approx(sum(row[key] for row in found["labels"].values()))


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(stride=13), "--stride=13: must be from 1 to train.seq_len=12"),
        (Reading(stride=0), "--stride=0: must be from 1"),
        (Reading(stride=4, memory=8), "give one of the two"),
        (Reading(memory=8), "model.block=llama"),
    ],
    ids=str,
)
def test_readings_that_cannot_be(restored: Restored, reading: Reading, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_text(restored, "nothing", reading, tmp_path)


def test_the_command_prints_and_writes_everything(native: Native, tmp_path: Path) -> None:
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text(TEXT)
    lines.write_text("".join(json.dumps({"body": words(4, i), "kind": "ab"[i % 2]}) + "\n" for i in range(6)))
    out = tmp_path / "out.json"
    fields = ["--field", "body", "--label-field", "kind", "--json", str(out)]
    done = launch("evaluate", str(native.path), *fields, "--data", str(plain), str(lines), "train.micro_batch_size=2")
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert json.loads(out.read_text()) == {"checkpoint": str(native.path), "step": 0, "data": printed}
    assert [row["data"] for row in printed] == [str(plain), str(lines)]
    assert printed[0]["characters"] == len(TEXT) - 1
    assert printed[1]["labels"].keys() == {"a", "b"}


# Likelihoods


def ids_of(text: str) -> list[int]:
    return ByteTokenizer().encode(text).tolist()


def test_likelihoods_are_those_of_one_forward_pass_each(native: Native, restored: Restored) -> None:
    model = native.build()
    pairs = [
        Pair([256], ids_of("d")),
        Pair(ids_of("def "), ids_of("x")),
        Pair(ids_of("a"), ids_of("bcd")),
        Pair(ids_of("q"), []),
    ]
    for context in ("def x", "yy"):  # and one that follows greedily
        best = int(logits_of(model, torch.tensor([ids_of(context)]))[0, -1].argmax())
        pairs.append(Pair(ids_of(context), [best]))
    found = likelihoods(restored.model, pairs, 12, batch_size=3)
    for pair, one in zip(pairs, found, strict=True):
        whole = torch.tensor([[*pair.context, *pair.continuation]])
        scores = logits_of(model, whole)[0].double().log_softmax(-1)[len(pair.context) - 1 : -1]
        wanted = whole[0, len(pair.context) :]
        assert one.log_probability == pytest.approx(float(scores.gather(1, wanted[:, None]).sum()), rel=1e-5)
        assert one.greedy == bool((scores.argmax(-1) == wanted).all())
    assert [one.greedy for one in found[-2:]] == [True, True]
    assert found[3] == (0.0, True)
    assert not all(one.greedy for one in found[:3])


def test_what_is_too_long_loses_its_left_end(native: Native, restored: Restored) -> None:
    context, continuation = ids_of(words(9)), ids_of("xyz")
    (found,) = likelihoods(restored.model, [Pair(context, continuation)], 12, 1)
    kept = [*context, *continuation][-13:]  # 12 are read, and the last one is only predicted
    scores = logits_of(native.build(), torch.tensor([kept[:-1]]))[0].double().log_softmax(-1)[-3:]
    expected = sum(float(row[i]) for row, i in zip(scores, continuation, strict=True))
    assert found.log_probability == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"train.seq_len=12: a continuation has 13 tokens"):
        likelihoods(restored.model, [Pair([1], [2] * 13)], 12, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"router": {"name": "expert_choice", "causal": False}}, "model=expert_choice: .*later tokens.*--data evaluates"),
        ({"router": ROUTER, "capacity_factor": 1.0}, "model.capacity_factor=1.0: .*give model.capacity_factor=null"),
    ],
    ids=str,
)
def test_models_without_likelihoods_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_likelihood(config_of(**model))


# Tasks


def test_without_lm_eval_the_extra_is_named(restored: Restored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'moe_train\[eval\]'"):
        require_lm_eval()
    with pytest.raises(UserError, match=r"pip install 'moe_train\[eval\]'"):
        harness_model(restored, 1)


def test_the_papers_metrics_and_their_mean() -> None:
    assert {task: metric.split(",")[0] for task, metric in RMOE.items()} == {
        "arc_easy": "acc",
        "hellaswag": "acc_norm",
        "piqa": "acc_norm",
        "sciq": "acc",
        "lambada_openai": "acc",
    }
    results = {task: {"acc,none": 0.25, "acc_norm,none": 0.5} for task in RMOE}
    assert summarise(results, RMOE) == {**{t: 0.5 if "norm" in m else 0.25 for t, m in RMOE.items()}, "mean": 0.35}
    del results["piqa"]
    assert summarise(results, RMOE) == {}
