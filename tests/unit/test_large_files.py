"""A large file that is one document is encoded block by block, and comes out as if it were encoded whole."""

import gzip
import io
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data import inputs as module
from moe_train.data import tokenizer as tokenizers
from moe_train.data.characters import CharacterTokenizer
from moe_train.data.indexed import IndexedDataset
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from moe_train.data.words import WordTokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

ROOT = Path(__file__).parents[2]
WORDS = ["def", "return", "naïve", "中文", "x:", ":\n", "\n\n", "  ", "\t", "▁", "self.value", " \n", "é"]


def text_of(count: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count)).encode()


PIECES = train_sentencepiece([text_of(600, seed) for seed in range(4)], None, 330)
TOKENIZERS: list[Tokenizer] = [
    ByteTokenizer(),
    CharacterTokenizer.read([bytes(range(256))]),
    WordTokenizer.read([text_of(600)]),
    PIECES,
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@given(st.lists(st.sampled_from([*WORDS, " ", "\n", "a", "\udcff"]), max_size=30), st.text(max_size=8))
@settings(deadline=None, max_examples=150)
def test_a_cut_changes_no_id(tokenizer: Tokenizer, parts: list[str], more: str) -> None:
    text = "".join(parts).encode(errors="surrogateescape")
    at, rest = tokenizer.cut(text), more.encode(errors="replace")
    assert 0 <= at <= len(text)
    if at:
        together = np.concatenate([tokenizer.encode(text[:at]), tokenizer.encode(text[at:] + rest)])
        assert together.tolist() == tokenizer.encode(text + rest).tolist()


@given(st.lists(st.sampled_from([*WORDS, " ", "\n", "a", "\udcff", "xx"]), max_size=40), st.integers(1, 30))
@settings(deadline=None, max_examples=150)
def test_blocks_of_sentencepiece_change_no_id(parts: list[str], size: int) -> None:
    text = "".join(parts).encode(errors="surrogateescape")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "MERGED_AT_ONCE", 1 << 30)
        whole = PIECES.encode(text).tolist()
        patch.setattr(tokenizers, "MERGED_AT_ONCE", size)
        assert PIECES.encode(text).tolist() == whole


def test_blocks_of_sentencepiece_are_the_ids_of_its_own_encode() -> None:
    text = text_of(5000, seed=3).replace("▁".encode(), b"")
    calls = []
    tokenizer = SentencePieceTokenizer.from_bytes(PIECES.content)
    processor = tokenizer._processor
    assert tokenizer.cut(text)
    tokenizer._processor = SimpleNamespace(encode=lambda raw, **how: calls.append(raw) or processor.encode(raw, **how))
    ids = tokenizer.encode(text)
    assert b"".join(calls) == text
    assert all(1000 <= len(raw) < 1200 for raw in calls[:-1])
    assert len(calls) > 10
    assert ids.tolist() == processor.encode(text.decode())


def test_a_unigram_model_is_not_cut() -> None:
    """Its sums of scores are rounded, and what is decided late in a text depends on what was added before."""
    text, model = Path(__file__).read_bytes(), io.BytesIO()
    options = {"model_type": "unigram", "vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "minloglevel": 2, "unk_id": 0, "eos_id": 1}
    lines = iter(text.decode().split("\n"))
    spm.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, bos_id=-1, **options)
    tokenizer = SentencePieceTokenizer.from_bytes(model.getvalue())
    assert tokenizer.cut(text) == 0
    plain = text.replace("▁".encode(), b"")
    assert tokenizer.encode(plain).tolist() == tokenizer._processor.encode(plain.decode())


def test_a_cut_is_found_in_common_text() -> None:
    for tokenizer in TOKENIZERS:
        assert tokenizer.cut(text_of(400, seed=9)) > 100, tokenizer.name


def files(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx", ".labels", ".json")]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [1, 700, 1 << 22])
def test_blocks_give_the_document_of_the_whole_file(
    tokenizer: Tokenizer, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(900 if size > 1 else 60)
    (tmp_path / "a.txt").write_bytes(text)
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(text[: len(text) // 2])
    with DatasetWriter(tmp_path / "one", tokenizer) as writer:
        for document in (text, text[: len(text) // 2]):
            writer.add_text(document)
    monkeypatch.setattr(module, "DOCUMENT_BLOCK", size)
    summary = prepare(Inputs([tmp_path / "a.txt", tmp_path / "b.txt.gz"]), tmp_path / "two", tokenizer)
    assert summary.documents == 2
    assert files(tmp_path / "two")[:3] == files(tmp_path / "one")[:3]


def test_policies_for_what_is_no_utf8_hold_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENT_BLOCK", 3)
    raw = "ab中文".encode() + b"\xe4\xb8" + b"xyz\xff"
    (tmp_path / "x.txt").write_bytes(raw)
    for policy, expected in (("keep", raw), ("replace", raw.decode(errors="replace").encode())):
        assert prepare(Inputs([tmp_path / "x.txt"], invalid_utf8=policy), tmp_path / "d", ByteTokenizer()).invalid == 1
        assert ByteTokenizer().decode_bytes(IndexedDataset(tmp_path / "d").document(0)) == expected
    with pytest.raises(UserError, match=r"x\.txt: no valid UTF-8"):
        prepare(Inputs([tmp_path / "x.txt"], invalid_utf8="error"), tmp_path / "e", ByteTokenizer())


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(text_of(200_000)[: 1 << 19] * 128)
    assert (tmp_path / "big.txt").stat().st_size == 1 << 26
    code = (
        "import resource, sys\n"
        "from moe_train.data.inputs import Inputs\n"
        "from moe_train.data.prepare import prepare\n"
        "from moe_train.data.tokenizer import ByteTokenizer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(Inputs([sys.argv[1]]), sys.argv[2], ByteTokenizer())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big.txt"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    # KiB for 64 MiB of text: a block of 1 MiB, its ids in 2 and, to count bytes, in 8 bytes each.
    assert grown < 40_000
