"""Damaged datasets and tokenizer files: read as what they say, or refused with one message."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import NUMBERS, damaged, examples, outcome, plan
from hypothesis import given
from hypothesis import strategies as st

from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.loader import EvalRows, Loader
from moe_train.data.sidecar import FORMAT
from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.writer import DatasetWriter

VOCABULARY, ROW = 512, 16
TEXTS = ["def f(x):\n    return x + 1\n" * 5, "été 中 😀", "a", "# nothing\n\n" * 8]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(["bytes", ".."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def write_sound(folder: Path, model: Path) -> dict[str, bytes]:
    """A sound dataset at folder/d; its files by suffix."""
    with DatasetWriter(folder / "d", load_tokenizer(model)) as writer:
        for i, text in enumerate(TEXTS * 3):
            writer.add_text(text, "ab"[i % 2])
    return {path.suffix: path.read_bytes() for path in folder.iterdir() if path.name.startswith("d.")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece(TEXTS * 4, path, 300)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, bytes]:
    return write_sound(tmp_path_factory.mktemp("sound"), model)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for suffix in (".bin", ".idx", ".json", ".labels", ".model"):
        (folder / f"d{suffix}").unlink(missing_ok=True)
    for suffix, content in files.items():
        (folder / f"d{suffix}").write_bytes(content)
    return folder / "d"


def read_everything(prefix: Path) -> None:
    """All that a run does with a dataset, and more of it. What comes out must be usable."""
    tokenizer = load_dataset_tokenizer(prefix)
    dataset = IndexedDataset(prefix, VOCABULARY, tokenizer)
    assert len(dataset.fingerprint) == 64
    for i in range(len(dataset)):
        assert dataset.document(i).dtype == np.int64
        assert 0 <= dataset.label(i) < len(dataset.label_names)
    options = {"seq_len": ROW, "micro_batch_size": 2, "vocab_size": VOCABULARY, "tokenizer": tokenizer}
    batches = list(EvalRows(prefix, max_rows=20, **options))
    loader = Loader(prefix, global_batch_size=4, seed=0, **options)
    for _ in range(4):
        step = loader.next_step()
        assert 0 <= step.target_count <= step.token_count == 4 * ROW
        batches += step.microbatches
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == (2, ROW)
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < VOCABULARY
        assert int(batch.targets.max()) < VOCABULARY
        assert int(batch.positions.max()) < ROW


def test_a_sound_dataset_is_read(tmp_path: Path, sound: dict[str, bytes]) -> None:
    assert set(sound) == {".bin", ".idx", ".json", ".labels", ".model"}
    read_everything(write(tmp_path, sound))


@examples(100, 5_000)
def test_damaged_files(tmp_path: Path, sound: dict[str, bytes], examples: int) -> None:
    refused = []

    @plan(examples)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        victims = data.draw(
            st.lists(st.sampled_from([".bin", ".idx", ".json", ".labels"]), min_size=1, max_size=2, unique=True)
        )
        files = sound | {suffix: data.draw(damaged(sound[suffix])) for suffix in victims}
        for suffix in data.draw(st.sampled_from([[], [], [], [".json", ".labels"], [".labels"], [".model"], [".bin"]])):
            files.pop(suffix, None)
        prefix = write(tmp_path, files)
        refused.append(outcome(lambda: read_everything(prefix)) is not None)

    attempt()
    assert any(refused)
    assert not all(refused)


@st.composite
def indexes(draw: st.DrawFn) -> dict[str, bytes]:
    """A .bin and an .idx that may contradict each other anywhere, but not in the length that the header says."""
    entry = st.sampled_from([*NUMBERS, 3, 5, 6, 7, 8, 2**63 + 1])
    n = draw(st.integers(0, 4))
    m = draw(st.sampled_from([n + 1, n + 1, n + 1, 0, 1]))
    code = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 8, 8]))
    width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    sizes = draw(st.lists(st.integers(0, 6) | entry, min_size=n, max_size=n))
    right = [width * sum(sizes[:i]) for i in range(n)]
    offsets = [draw(st.sampled_from([value, value, value, value + 1, draw(entry)])) for value in right]
    boundaries = [draw(st.sampled_from([min(i, n)] * 5 + [draw(entry)])) for i in range(m)]
    end = (offsets[-1] + width * sizes[-1]) if n else 0
    size = end if end < 4096 and draw(st.booleans()) else draw(st.integers(0, 64))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, n, m)
    for values, bits in ((sizes, 32), (offsets, 64), (boundaries, 64)):
        index += b"".join((value % 2**bits).to_bytes(bits // 8, "little") for value in values)
    return {".idx": index, ".bin": draw(st.binary(min_size=size, max_size=size))}


@examples(150, 10_000)
def test_indexes_that_contradict_themselves(tmp_path: Path, examples: int) -> None:
    @plan(examples)
    @given(indexes())
    def attempt(files: dict[str, bytes]) -> None:
        outcome(lambda: read_everything(write(tmp_path, files)))

    attempt()


@examples(100, 5_000)
def test_sidecars_with_other_values(tmp_path: Path, sound: dict[str, bytes], examples: int) -> None:
    fields = json.loads(sound[".json"])

    @plan(examples)
    @given(
        st.dictionaries(st.sampled_from([*fields, "more"]), JSON, max_size=3), st.sets(st.sampled_from([*fields]), max_size=1)
    )
    def attempt(changed: dict[str, Any], gone: set[str]) -> None:
        edited = {key: value for key, value in (fields | changed).items() if key not in gone}
        prefix = write(tmp_path, sound | {".json": json.dumps(edited).encode()})
        outcome(lambda: read_everything(prefix))

    attempt()


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '{"format": 1e999}', "NaN", '"\\ud800"', "", "{}"]
)
def test_json_that_is_no_sidecar(tmp_path: Path, sound: dict[str, bytes], content: str) -> None:
    assert outcome(lambda: read_everything(write(tmp_path, sound | {".json": content.encode()})))


@examples(150, 10_000)
def test_damaged_tokenizers(tmp_path: Path, model: Path, examples: int) -> None:
    content = model.read_bytes()

    @plan(examples)
    @given(damaged(content) | st.binary(max_size=80))
    def attempt(changed: bytes) -> None:
        path = tmp_path / "t.model"
        path.write_bytes(changed)
        outcome(lambda: use_tokenizer(path))

    attempt()


VOCABULARIES = {
    "characters": b'{"tokenizer": "characters", "symbols": [10, 32, 97, 98, 99, 100, 255]}',
    "words": b'{"tokenizer": "words", "words": ["<eos>", "a", "def", "x\\u00e9", "<unk>", "\\udcff"]}',
    "tokenizer.json": (Path(__file__).parent / "tokenizer.json").read_bytes(),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
@examples(60, 4_000)
def test_damaged_vocabularies(tmp_path: Path, kind: str, examples: int) -> None:
    assert outcome(lambda: use_vocabulary(VOCABULARIES[kind], tmp_path)) is None

    @plan(examples)
    @given(damaged(VOCABULARIES[kind]))
    def attempt(changed: bytes) -> None:
        outcome(lambda: use_vocabulary(changed, tmp_path))

    attempt()


def use_vocabulary(content: bytes, folder: Path) -> None:
    """Ids are in range, and what they stand for can be said."""
    (folder / "t").write_bytes(content)
    tokenizer = load_tokenizer(folder / "t")
    ids = tokenizer.encode("abc d a\n")
    assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size > tokenizer.eod
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert len(tokenizer.decode_bytes(ids)) == tokenizer.byte_lengths()[ids].sum()


def use_tokenizer(path: Path) -> None:
    """Any text comes back from a tokenizer that was accepted."""
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "\ud800", "x" * 5000, "/dev/null", "/proc/self/mem"])
@pytest.mark.parametrize("open_", [IndexedDataset, load_tokenizer, load_dataset_tokenizer])
def test_names_that_are_no_files(name: str, open_: Callable[[str], Any]) -> None:
    if outcome(lambda: open_(name)) is None:
        assert open_ is load_dataset_tokenizer  # a dataset without a sidecar has no tokenizer


def test_the_tokenizer_of_bytes_has_no_file(tmp_path: Path) -> None:
    fields = {"format": FORMAT, "version": 1, "tokenizer": "bytes", "tokenizer_file": None, "fingerprint": "bytes-257"}
    fields |= {"vocab_size": 257, "eod": 256, "label_names": ["unknown"], "num_documents": 1, "num_tokens": 1, "num_bytes": 1}
    (tmp_path / "d.json").write_text(json.dumps(fields | {"source": None}))
    assert isinstance(load_dataset_tokenizer(tmp_path / "d"), ByteTokenizer)
    (tmp_path / "d.json").write_text(json.dumps(fields | {"source": None, "tokenizer": "/etc/hostname"}))
    assert "tokenizer" in str(outcome(lambda: load_dataset_tokenizer(tmp_path / "d")))
