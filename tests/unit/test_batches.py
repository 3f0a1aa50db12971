"""Lines are read, encoded and written in batches: where one ends changes nothing, and what is wrong is named with its own line."""

import gzip
import json
from pathlib import Path

import pytest

from moe_train.data import inputs as module
from moe_train.data import prepare as preparing
from moe_train.data import tokenizer as tokenizers
from moe_train.data.indexed import IndexedDataset
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, train_sentencepiece
from moe_train.errors import UserError

PIECES = train_sentencepiece([f"some words {i}\n" for i in range(200)], None, 300)
LINE = 32  # bytes
LINES = 14


def line(text: str = "good") -> bytes:
    return json.dumps({"text": text}).encode().ljust(LINE - 1) + b"\n"


def write(path: Path, wrong: dict[int, bytes]) -> Path:
    """Lines of equal length, numbered from 1, some of them wrong."""
    path.write_bytes(b"".join(wrong.get(n, line(f"good {n}")).ljust(LINE - 1) for n in range(1, LINES + 1)))
    return path


def texts(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    return [ByteTokenizer().decode_bytes(dataset.document(i)) for i in range(len(dataset))]


def content(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx", ".labels", ".json")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of every kind: short and long, with and without text, of any bytes, with a mark that SentencePiece cannot carry."""
    kinds = ["some words", "", "naïve 中文", "▁", "words " * 300, "a\u2028b\r\n", '"quoted" \\'] * 6
    rows = [json.dumps({"text": text, "lang": i % 4}, ensure_ascii=i % 2 > 0) for i, text in enumerate(kinds)]
    rows[10:10] = ["", "  ", " " + rows[0] + "\t\r"]
    raw = "\n".join(rows).encode()
    data = tmp_path / "data"
    data.mkdir()
    (data / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"quoted", b"caf\xe9") + b'\n{"text": "\xe4\xb8", "lang": 1}')
    (data / "y.jsonl.gz").write_bytes(gzip.compress(raw))
    (data / "z.jsonl").write_bytes(b"\xef\xbb\xbf")
    return data


@pytest.mark.parametrize("policy", ["keep", "replace"])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PIECES], ids=lambda t: t.name)
def test_batches_change_nothing(
    tokenizer: Tokenizer, policy: module.Policy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs([folder], label_field="lang", invalid_utf8=policy)
    alone = prepare(inputs, tmp_path / "one/d", tokenizer)
    assert alone.invalid == 7
    assert alone.empty == 12
    assert alone.documents == 2 * 43 + 1 - 12
    for batch, part in ((1, 1 << 20), (200, 1 << 20), (200, 700), (1 << 20, 5000)):
        monkeypatch.setattr(module, "BATCH", batch)
        monkeypatch.setattr(preparing, "PART", part)
        assert prepare(inputs, tmp_path / "two/d", tokenizer) == alone
        assert content(tmp_path / "two/d") == content(tmp_path / "one/d")


class Refuses(ByteTokenizer):
    """As a tokenizer whose vocabulary lacks a byte."""

    def encode(self, text: str | bytes) -> tokenizers.Ids:
        assert isinstance(text, bytes)
        if b"\x07" in text:
            raise UserError("byte 7 is none of the characters")
        return super().encode(text)


WRONG = {
    b'{"text": "cut\n': "not a JSON line",
    b'{"text": 5}\n': "must be text, not a number",
    b'{"text": "a"},{"text": "b"}\n': "not a JSON line .Extra data",
    b'{"text": "a"} x\n': "not a JSON line .Extra data",
    b'{"text": "caf\xe9"}\n': "no valid UTF-8",
    b'{"text": "bell \\u0007"}\n': "byte 7 is none",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("part", [100, 1 << 20])
def test_the_wrong_line_is_named_wherever_it_is_in_a_batch(
    wrong: bytes, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 3 * LINE)
    monkeypatch.setattr(preparing, "PART", part)
    path, inputs = tmp_path / "x.jsonl", Inputs([tmp_path / "x.jsonl"], invalid_utf8="error")
    write(path, {})
    sizes = [len(batch.texts) for piece in inputs.pieces(part) for batch in inputs.read(piece)]
    assert sum(sizes) == LINES
    assert max(sizes) == 4
    padded = wrong[:-1].ljust(LINE - 1) + b"\n"
    for number in range(1, LINES + 1):
        write(path, {number: padded})
        with pytest.raises(UserError, match=rf"x\.jsonl:{number}: .*{WRONG[wrong]}"):
            prepare(inputs, tmp_path / "d", Refuses())


def test_two_lines_that_are_one_object_together_are_both_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {5: b'{"text": "a"\n', 6: b'"more": 1}\n', 8: b'{"a": [{}\n', 9: b'{}], "text": "x"}\n'})
    with pytest.raises(UserError, match=r"x\.jsonl:5: not a JSON line"):
        prepare(Inputs([path]), tmp_path / "d", ByteTokenizer())
    assert prepare(Inputs([path], skip_bad_lines=True), tmp_path / "d", ByteTokenizer()).skipped == 4
    assert texts(tmp_path / "d") == [f"good {n}".encode() for n in range(1, LINES + 1) if n not in (5, 6, 8, 9)]


@pytest.mark.parametrize("batch", [1, 3 * LINE, 1 << 20])
def test_the_first_of_several_wrong_lines_is_named(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tokenizer finds out later than the reader."""
    monkeypatch.setattr(module, "BATCH", batch)
    path = write(tmp_path / "x.jsonl", {6: line("bell \x07"), 7: line("bell \x07"), 8: b"{bad\n"})
    with pytest.raises(UserError, match=r"x\.jsonl:6: byte 7"):
        prepare(Inputs([path]), tmp_path / "d", Refuses())


@pytest.mark.parametrize("number", range(1, 10))
def test_a_document_without_text_is_left_out_wherever_it_is_in_a_batch(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 3 * LINE)
    path = write(tmp_path / "x.jsonl", {number: line(""), number + 1: b"\n", number + 2: b"{bad\n"})
    summary = prepare(Inputs([path], skip_bad_lines=True), tmp_path / "d", ByteTokenizer())
    assert (summary.empty, summary.skipped, summary.documents) == (1, 1, LINES - 3)
    assert texts(tmp_path / "d") == [f"good {n}".encode() for n in range(1, LINES + 1) if not number <= n < number + 3]


@pytest.mark.parametrize(("limit", "match"), [("MAX_DOCUMENT", "document 10 has 10 tokens"), ("MAX_LABELS", "more than 8")])
def test_limits_of_the_format_name_the_line(limit: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"moe_train.data.writer.{limit}", 8)
    rows = [{"text": "12345" if n < 11 else "123456789", "kind": n % 7 if n < 11 else 9} for n in range(1, 15)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"x\.jsonl:11: {match}"):
        prepare(Inputs([tmp_path / "x.jsonl"], label_field="kind"), tmp_path / "d", ByteTokenizer())
