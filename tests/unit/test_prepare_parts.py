"""Preparing at scale: compressed files, many processes, kills, policies for what is wrong; the result is always the same bytes."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from moe_train.data import prepare as module
from moe_train.data.attack import STOP_WORDS, swap_words
from moe_train.data.characters import CharacterTokenizer
from moe_train.data.corpus import read_sources
from moe_train.data.indexed import IndexedDataset
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = (".bin", ".idx", ".labels", ".json")


def lines(count, **more):
    return [json.dumps({"text": f"text {i} " * (i % 7), "lang": "abc"[i % 3], **more}) for i in range(count)]


def write_lines(path, rows):
    path.write_text("\n".join(rows) + "\n")
    return path


def texts(prefix):
    dataset = IndexedDataset(prefix)
    return [ByteTokenizer().decode_bytes(dataset.document(i)) for i in range(len(dataset))]


def content(prefix):
    return [(prefix.parent / (prefix.name + suffix)).read_bytes() for suffix in FILES]


@pytest.fixture
def folder(tmp_path):
    """Inputs of every kind, in pieces of a few hundred bytes."""
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "x.jsonl", lines(400))
    write_lines(data / "empty.jsonl", [""])
    (data / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(lines(50)).encode()))
    (data / "packed.jsonl.zst").write_bytes(zstd.compress("\n".join(lines(60)[:20]).encode()) + zstd.compress(b"\n"))
    (data / "page.txt").write_text("one page\nof text")
    (data / "page.txt.zst").write_bytes(zstd.compress(b"another page"))
    (data / "void.txt").write_bytes(b"")
    return data


# The same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_and_parts_change_nothing(tmp_path, folder, monkeypatch, workers):
    inputs = Inputs([folder], label_field="lang")
    alone = prepare(inputs, tmp_path / "one", ByteTokenizer())
    monkeypatch.setattr(module, "PART", 5000)
    told = []
    summary = prepare(inputs, tmp_path / "many", ByteTokenizer(), workers=workers, progress=lambda *at: told.append(at))
    assert summary == alone
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert len(told) > 3
    assert told[-1][0] == told[-1][1] == sum(file.stat().st_size for file in folder.iterdir())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_ranges_cut_lines_nowhere(tmp_path, monkeypatch, size):
    path = write_lines(tmp_path / "x.jsonl", lines(30))
    prepare(Inputs([path]), tmp_path / "one", ByteTokenizer())
    monkeypatch.setattr(module, "PART", size)
    pieces = list(Inputs([path]).pieces(size))
    assert sum(piece.size for piece in pieces) == path.stat().st_size
    if size > 1:  # a part per byte is a file per byte
        prepare(Inputs([path]), tmp_path / "two", ByteTokenizer())
        assert content(tmp_path / "two") == content(tmp_path / "one")
    read = [text for piece in pieces for batch in Inputs([path]).read(piece) for text in batch.texts]
    assert read == texts(tmp_path / "one")


def test_a_tokenizer_with_a_file_is_written_once(tmp_path, folder, monkeypatch):
    tokenizer = train_sentencepiece([f"some words {i}\n" for i in range(200)], None, 300)
    prepare(Inputs([folder]), tmp_path / "one", tokenizer)
    monkeypatch.setattr(module, "PART", 9000)
    prepare(Inputs([folder]), tmp_path / "two", tokenizer, workers=2)
    assert content(tmp_path / "one")[:3] == content(tmp_path / "two")[:3]
    assert (tmp_path / "two.model").read_bytes() == (tmp_path / "one.model").read_bytes()


# Kills and errors


def test_a_killed_preparation_goes_on(tmp_path, folder):
    """SIGKILL after the first parts: no dataset, no orphan; then the finished parts are taken over and the result is the same."""
    write_lines(folder / "y.jsonl", lines(30_000))
    inputs = Inputs([folder], label_field="lang")
    prepare(inputs, tmp_path / "one", ByteTokenizer())
    code = (
        "import sys\n"
        "from moe_train.data import prepare as module\n"
        "from moe_train.data.inputs import Inputs\n"
        "from moe_train.data.tokenizer import ByteTokenizer\n"
        "if __name__ == '__main__':\n"
        "    module.PART = 20_000\n"
        "    module.prepare(Inputs([sys.argv[1]], label_field='lang'), sys.argv[2], ByteTokenizer(), workers=2)\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), str(folder), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    parts = tmp_path / ".two.parts"
    while len(list(parts.glob("*.done"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is preparing"):
        prepare(inputs, tmp_path / "two", ByteTokenizer())
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("two*"))
    _wait_for_the_end_of(process.pid)
    stamps = {path: path.stat().st_mtime_ns for path in parts.glob("*.done")}
    assert len(stamps) >= 3
    kept = {path: path.read_bytes() for path in parts.glob("*.bin")}
    (tmp_path / ".two.bin.0123.tmp").write_bytes(b"left over")
    subprocess.run([*command], env=environment, check=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert kept
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _wait_for_the_end_of(session):
    """Workers end with the process that started them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    raise AssertionError("a worker outlived the process that started it")


def test_finished_parts_are_taken_over_unless_something_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 2000)
    path = write_lines(tmp_path / "x.jsonl", [*lines(100), "{bad"])
    good = "\n".join(lines(100))
    with pytest.raises(UserError, match=r"x\.jsonl:101: not a JSON line"):
        prepare(Inputs([path]), tmp_path / "d", ByteTokenizer())
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".d.parts").glob("*.done")}
    assert len(done) > 1
    with pytest.raises(UserError, match=r"x\.jsonl:101"):
        prepare(Inputs([path]), tmp_path / "d", ByteTokenizer())
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".d.parts").glob("*.done")} == done
    path.write_text(good.replace("text 1 ", "TEXT 1 "))
    prepare(Inputs([path]), tmp_path / "d", ByteTokenizer())
    assert texts(tmp_path / "d")[0] == b"TEXT 1 "
    assert not (tmp_path / ".d.parts").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_wrong_line_is_named_whatever_the_parts(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(module, "PART", 1000)
    rows = lines(200)
    rows[120] = rows[170] = "{bad"
    path = write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=r"x\.jsonl:121: not a JSON line"):
        prepare(Inputs([path]), tmp_path / "d", ByteTokenizer(), workers=workers)
    assert not list(tmp_path.glob("d*"))
    summary = prepare(Inputs([path], skip_bad_lines=True), tmp_path / "d", ByteTokenizer(), workers=workers)
    assert summary.skipped == 2
    assert summary.documents + summary.empty == 198


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz", "x.jsonl.zst", "x.txt.zst"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.9, -1])
def test_a_cut_file_is_an_error_and_leaves_nothing(tmp_path, name, kept):
    pack = gzip.compress if name.endswith("gz") else zstd.compress
    packed = pack("\n".join(lines(300)).encode())
    cut = packed[: int(kept * len(packed)) if isinstance(kept, float) else kept]
    (tmp_path / name).write_bytes(cut)
    match = rf"{name}: it is cut or damaged" if cut else "no document with text|cut"  # nothing is an empty file for gzip
    with pytest.raises(UserError, match=match):
        prepare(Inputs([tmp_path / name]), tmp_path / "d", ByteTokenizer())
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text, not compressed at all")
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        prepare(Inputs([tmp_path / name]), tmp_path / "d", ByteTokenizer())


# What is wrong in a text


def test_policies_for_what_is_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    for policy, expected in (("keep", b"caf\xe9"), ("replace", "caf\ufffd".encode())):
        inputs = Inputs([tmp_path / "a.txt", tmp_path / "b.jsonl"], invalid_utf8=policy)
        assert prepare(inputs, tmp_path / "d", ByteTokenizer()).invalid == 2
        assert texts(tmp_path / "d") == [expected, b"ok", expected]
    for name, match in (("a.txt", r"a\.txt: no valid UTF-8"), ("b.jsonl", r"b\.jsonl:2: no valid UTF-8")):
        with pytest.raises(UserError, match=match):
            prepare(Inputs([tmp_path / name], invalid_utf8="error"), tmp_path / "e", ByteTokenizer())
    inputs = Inputs([tmp_path / "b.jsonl"], invalid_utf8="error", skip_bad_lines=True)
    assert prepare(inputs, tmp_path / "e", ByteTokenizer()).skipped == 1


def test_lines_of_a_text_are_documents(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \nthree")
    summary = prepare(Inputs([tmp_path / "x.txt"], lines=True), tmp_path / "d", ByteTokenizer())
    assert texts(tmp_path / "d") == [b"one", b" two ", b"three"]
    assert summary.empty == 1


class Refuses(ByteTokenizer):
    """As a tokenizer whose vocabulary lacks a byte."""

    def encode(self, text):
        if b"\x07" in text:
            raise UserError("byte 7 is none of the characters")
        return super().encode(text)


@pytest.mark.parametrize("part", [60, 1 << 20])
def test_what_cannot_be_encoded_is_named_with_its_file_and_line(tmp_path, monkeypatch, part):
    monkeypatch.setattr(module, "PART", part)
    monkeypatch.setattr("moe_train.data.inputs.DOCUMENT_BLOCK", 8)
    write_lines(tmp_path / "a.jsonl", [*lines(3), "", json.dumps({"text": "bell \x07"})])
    (tmp_path / "b.txt").write_text("fine\n\nbell \x07\n")
    for name, options, where in (
        ("a.jsonl", {}, r"a\.jsonl:5: byte 7"),
        ("a.jsonl", {"swap_words": 0.01}, r"a\.jsonl:5: byte 7"),
        ("b.txt", {"lines": True}, r"b\.txt:3: byte 7"),
        ("b.txt", {}, r"b\.txt: byte 7"),
    ):
        with pytest.raises(UserError, match=where):
            prepare(Inputs([tmp_path / name], **options), tmp_path / "d", Refuses())


def test_an_error_of_a_worker_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 200)
    path = write_lines(tmp_path / "x.jsonl", [*lines(30), json.dumps({"text": "é"})])
    with pytest.raises(UserError, match=r"x\.jsonl:31: byte 0 of a text is b'\\xc3'.* not among the \d+ characters"):
        prepare(Inputs([path]), tmp_path / "d", CharacterTokenizer(range(128)), workers=2)


# What is no text


def test_a_folder_with_files_that_are_no_text_is_refused_with_their_names(tmp_path):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.txt").write_text("text")
    (data / "sub" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (data / "c.bin").write_bytes(bytes(10))
    with pytest.raises(UserError, match=r"data: 2 of its files are no text \(.*c\.bin, .*sub/b\.png\); remove them, or name"):
        prepare(Inputs([data]), tmp_path / "d", ByteTokenizer())
    prepare(Inputs([data / "c.bin"]), tmp_path / "d", ByteTokenizer())  # whoever names it means it
    assert texts(tmp_path / "d") == [bytes(10)]
    (data / "c.bin").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"c\.bin is a Parquet file, no text; convert it"):
        prepare(Inputs([data / "c.bin"]), tmp_path / "d", ByteTokenizer())


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_with_documents_is_not_taken_for_a_text(tmp_path, name):
    pack = gzip.compress if name.endswith(".gz") else bytes
    for records in (b'{"text": "a"}\n{"text": "b"}\n', b'[{"text": "a"},\n {"text": "b"}]'):
        (tmp_path / name).write_bytes(pack(records))
        with pytest.raises(UserError, match=rf"{name}: holds JSON objects with the field 'text'.*jsonl"):
            prepare(Inputs([tmp_path / name]), tmp_path / "d", ByteTokenizer())
    for text in (b'{"other": 1}\n', b"[1, 2]", b"[]", b"{ no json"):
        (tmp_path / name).write_bytes(pack(text))
        prepare(Inputs([tmp_path / name]), tmp_path / "d", ByteTokenizer())
        assert texts(tmp_path / "d") == [text]


# The attack


def test_the_attack_swaps_its_share_of_the_words_of_each_line():
    text = "\n".join(" ".join(f"word{i}{j}" if j % 2 else "the" for j in range(80)) for i in range(50)).encode()
    swapped = swap_words(text, 0.025, 0)
    for before, after in zip(text.split(b"\n"), swapped.split(b"\n"), strict=True):
        changed = [(a, b) for a, b in zip(before.split(), after.split(), strict=True) if a != b]
        assert len(changed) == 2
        assert all(a.decode() not in STOP_WORDS and b == b"AAA" for a, b in changed)
    assert swap_words(text, 0.025, 0) == swapped
    assert swap_words(text, 0.025, 1) != swapped


@pytest.mark.parametrize("text", [b"", b"\n \n", b"the and of\n", b" = = . ,\n"])
def test_the_attack_leaves_alone_what_has_no_words(text):
    assert swap_words(text, 0.5, 0) == text


def test_the_attack_keeps_white_space_and_hits_at_least_one_word_of_a_line():
    assert swap_words(b"  the \t fox\r\n\n dog ", 0.025, 0) == b"  the \t AAA\r\n\n AAA "


def test_the_attack_does_not_depend_on_parts(tmp_path, folder, monkeypatch):
    inputs = Inputs([folder], swap_words=0.2, seed=5)
    prepare(inputs, tmp_path / "one", ByteTokenizer())
    monkeypatch.setattr(module, "PART", 3000)
    prepare(inputs, tmp_path / "two", ByteTokenizer(), workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert b"AAA" in b"".join(texts(tmp_path / "one"))
    prepare(Inputs([folder]), tmp_path / "three", ByteTokenizer())
    assert content(tmp_path / "three") != content(tmp_path / "one")


def test_a_document_that_is_too_long_for_the_format_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    """Of 2**31 tokens; here the limit is lower."""
    monkeypatch.setattr("moe_train.data.writer.MAX_DOCUMENT", 20)
    (tmp_path / "x.txt").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="document 0 has 21 tokens, outside 1 to 20; split it"):
        prepare(Inputs([tmp_path / "x.txt"]), tmp_path / "d", ByteTokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    (tmp_path / "x.txt").write_bytes(b"x" * 19)
    assert prepare(Inputs([tmp_path / "x.txt"]), tmp_path / "d", ByteTokenizer()).tokens == 20


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path):
    """Positions beyond 2**31 bytes: five parts of half a gigabyte."""
    with DatasetWriter(tmp_path / "part", ByteTokenizer()) as writer:
        for value in range(4):
            writer.add(np.full(2**26, value, dtype=np.uint16))
    part = IndexedDataset(tmp_path / "part")
    with DatasetWriter(tmp_path / "d", ByteTokenizer()) as writer:
        for _ in range(5):
            writer.add_dataset(part)
    whole = IndexedDataset(tmp_path / "d")
    assert (tmp_path / "d.bin").stat().st_size == 5 * 2**29 > 2**31
    assert (len(whole), whole.num_tokens) == (20, 5 * 2**28)
    last = whole.start(19)
    assert whole.read(last - 1, last + 1).tolist() == [2, 3]
    assert whole.sidecar.num_bytes == whole.num_tokens


@pytest.mark.slow
def test_a_sentencepiece_model_of_96512_pieces(tmp_path):
    tokenizer = train_sentencepiece((source.text for source in read_sources()), tmp_path / "t.model", 96_512)
    text = (ROOT / "README.md").read_text() + "\u2581 \U0001f9ff  \n"
    assert tokenizer.vocab_size == 96_512
    assert load_tokenizer(tmp_path / "t.model").decode(tokenizer.encode(text)) == text
