"""Preparing data: what goes in comes out, in order, and whatever is wrong with it is one clear line."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import ByteTokenizer, train_sentencepiece
from moe_train.errors import UserError

ROOT = Path(__file__).parents[2]


def texts(prefix):
    dataset = IndexedDataset(prefix)
    tokenizer = load_dataset_tokenizer(prefix)
    return [tokenizer.decode_bytes(dataset.document(i)) for i in range(len(dataset))]


def labels(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.label_names[dataset.label(i)] for i in range(len(dataset))]


def write_lines(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def launch(*words, cwd):
    command = [sys.executable, str(ROOT / "launch/prepare_data.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_files_are_documents_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\xef\xbb\xbf")
    (tmp_path / "b").write_bytes(b"no suffix")
    summary = prepare(Inputs([tmp_path / "b", tmp_path / "a.txt"]), tmp_path / "out", ByteTokenizer())
    assert texts(tmp_path / "out") == [b"no suffix", b"one\r\ntwo\n\xef\xbb\xbf"]
    assert (summary.documents, summary.bytes_of_text, summary.tokens) == (2, 21, 23)


def test_folders_are_read_in_the_order_of_paths_without_hidden_and_own_files(tmp_path):
    data = tmp_path / "data"
    for name in ("b.txt", "a/z.txt", "a/sub/y.txt", "a.txt", ".hidden", ".git/config", "C.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text('{"text": "C"}' if name.startswith("C") else name)
    for _ in range(2):  # the second time with the output of the first one in the folder
        prepare(Inputs([data], without=data / "out"), data / "out", ByteTokenizer())
        assert texts(data / "out") == [b"C", b"a/sub/y.txt", b"a/z.txt", b"a.txt", b"b.txt"]


def test_lines_are_documents_with_labels(tmp_path):
    path = write_lines(
        tmp_path / "x.jsonl",
        [
            "\ufeff",
            {"text": "eins", "lang": "de"},
            "\n",
            {"text": "two", "lang": "en"},
            {"text": "3", "lang": None},
            {"text": "", "lang": 1},
        ],
    )
    summary = prepare(Inputs([path], label_field="lang"), tmp_path / "out", ByteTokenizer())
    assert texts(tmp_path / "out") == [b"eins", b"two", b"3"]
    assert labels(tmp_path / "out") == ["de", "en", "unknown"]
    assert (summary.documents, summary.empty) == (3, 1)


def test_another_field_and_no_newline_at_the_end(tmp_path):
    path = tmp_path / "x.ndjson"
    path.write_text('{"body": "a\\nb"}\r\n{"body": "c"}')
    prepare(Inputs([path], field="body"), tmp_path / "out", ByteTokenizer())
    assert texts(tmp_path / "out") == [b"a\nb", b"c"]


def test_invalid_utf8_is_kept_and_counted(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "ok"}\n{"text": "lone \\ud83e, pair \\ud83e\\uddff"}\n')
    inputs = Inputs([tmp_path / "latin.txt", tmp_path / "x.jsonl"])
    trained = train_sentencepiece([f"some words {i}\n" for i in range(200)], None, 300)
    for tokenizer in (ByteTokenizer(), trained):
        summary = prepare(inputs, tmp_path / tokenizer.name / "out", tokenizer)
        assert summary.invalid == 3
        found = texts(tmp_path / tokenizer.name / "out")
        assert found == [b"caf\xe9", b"caf\xe9", b"ok", "lone \ufffd, pair \U0001f9ff".encode()]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", r"x\.jsonl:2: not a JSON line"),
        ("[1]", r"x\.jsonl:2: .* an object .* not a list"),
        ("null", "not null"),
        ('{"txt": "a"}', r"x\.jsonl:2: no field 'text' among 'txt'"),
        ("{}", "among nothing"),
        ('{"text": 5}', r"x\.jsonl:2: field 'text' must be text, not a number"),
        ('{"text": null}', "not null"),
        ('{"text": "a"}', "no field 'lang'"),
        ('{"text": "a", "lang": [1]}', "label field 'lang' must be text"),
        ("[" * 100_000, "not a JSON line"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_left(tmp_path, line, match):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "good", "lang": "x"}, line + "\n"])
    with pytest.raises(UserError, match=match):
        prepare(Inputs([path], label_field="lang"), tmp_path / "out", ByteTokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_compressed_files_are_refused(tmp_path, magic, name):
    (tmp_path / name).write_bytes(magic + b"rest")
    with pytest.raises(UserError, match="compressed"):
        prepare(Inputs([tmp_path / name]), tmp_path / "out", ByteTokenizer())


def test_nothing_to_prepare_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "folder").mkdir()
    for paths, match in (
        ([tmp_path / "empty.txt", tmp_path / "empty.jsonl"], "no document with text"),
        ([tmp_path / "folder"], "no files in"),
        ([tmp_path / "absent"], "absent does not exist"),
        (["x" * 300], "does not exist"),
        (["a\0b"], "does not exist"),
        ([], "no files"),
    ):
        with pytest.raises(UserError, match=match):
            prepare(Inputs(paths), tmp_path / "out", ByteTokenizer())
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="cannot write"):
        prepare(Inputs([tmp_path / "a.txt"]), tmp_path / "a.txt" / "out", ByteTokenizer())
    (tmp_path / "raw.json").write_text("{}")
    with pytest.raises(UserError, match=r"raw\.json exists"):
        prepare(Inputs([tmp_path / "raw.json"]), tmp_path / "raw", ByteTokenizer())
    assert (tmp_path / "raw.json").read_text() == "{}"


def test_memory_does_not_grow_with_the_input(tmp_path):
    line = json.dumps({"text": "x" * 999}) + "\n"
    with (tmp_path / "big.jsonl").open("w") as file:
        for _ in range(20):
            file.write(line * 1000)
    code = (
        "import resource, sys\n"
        "from moe_train.data.inputs import Inputs\n"
        "from moe_train.data.prepare import prepare\n"
        "from moe_train.data.tokenizer import ByteTokenizer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(Inputs([sys.argv[1]]), sys.argv[2], ByteTokenizer())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big.jsonl"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert grown < 10_000  # KiB, for 20 MB of text


# The command


def test_the_command_from_lines_to_a_dataset_of_pieces(tmp_path):
    write_lines(
        tmp_path / "x.jsonl",
        [{"text": f"some words {i}\n", "lang": "ab"[i % 2]} for i in range(200)] + [{"text": "", "lang": "a"}],
    )
    done = launch("x.jsonl", "--output", "out/d", "--train-sentencepiece", 300, "--label-field", "lang", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "out/d: 200 documents" in done.stdout
    assert "sentencepiece, 300 ids), 2 labels" in done.stdout
    assert "left out 1 documents" in done.stdout
    assert texts(tmp_path / "out/d")[7] == b"some words 7\n"
    again = launch("x.jsonl", "--output", "two", "--tokenizer", "out/d.model", "--label-field", "lang", cwd=tmp_path)
    assert again.returncode == 0
    for suffix in (".bin", ".idx", ".labels", ".model"):
        assert (tmp_path / f"two{suffix}").read_bytes() == (tmp_path / f"out/d{suffix}").read_bytes()


def test_the_command_shows_its_progress_on_a_terminal(tmp_path):
    """Each frame of the bar says how much is done; the last one says that all is."""
    total = 3 << 20
    for i in range(3):  # a part each
        (tmp_path / f"{i}.txt").write_bytes(b"x" * (total // 3))
    code = (
        "import sys\n"
        "from moe_train.data import prepare\n"
        "prepare.PART = 1 << 20\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "import prepare_data\n"
        "prepare_data.run(sys.argv[1:])\n"
    )
    main, end = pty.openpty()
    command = [sys.executable, "-c", code, str(ROOT / "launch"), "0.txt", "1.txt", "2.txt", "--output", "d", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=end, stdout=subprocess.PIPE) as process:
        os.close(end)
        shown = read_all(main)
        assert process.stdout.read().startswith(b"d: 3 documents")
    assert process.returncode == 0
    done = re.findall(r"([\d.]+)/([\d.]+|\?) (bytes|MB)", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown))
    assert done[-1] == ("3.1", "3.1", "MB")
    assert [float(at) for at, _, _ in done] == sorted(float(at) for at, _, _ in done)
    assert "━" in shown


def read_all(terminal):
    """What a process writes to a terminal until it ends, which is an error for the reader."""
    found = b""
    with contextlib.suppress(OSError):
        while block := os.read(terminal, 1 << 16):
            found += block
    os.close(terminal)
    return found.decode()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent", "--output", "d"], "input absent does not exist"),
        (["a.txt"], "--output PREFIX"),
        (["a.txt", "--output", "d", "--tokenizer", "absent.model"], "absent.model"),
        (["a.txt", "--output", "d", "--train-sentencepiece", "9999"], "cannot train 9999 pieces"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, words, message):
    (tmp_path / "a.txt").write_text("some text\n")
    done = launch(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_command_writes_the_default_corpus(tmp_path):
    done = launch("--default-corpus", "dc", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["dc/bytes/train", "dc/bytes/valid", "dc/bytes/test"]
    assert IndexedDataset(tmp_path / "dc/bytes/train").num_tokens > 5e6
