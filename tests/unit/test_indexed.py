"""The dataset format: byte for byte Megatron-LM's, safe to interrupt, and damage is an error rather than garbage."""

import json
import os
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

DOCUMENTS = [("one", "a"), ("", "b"), ("three\n" * 50, "a"), ("été", "c")]


def write(prefix, documents=DOCUMENTS, tokenizer=None, **options):
    with DatasetWriter(prefix, tokenizer or ByteTokenizer(), **options) as writer:
        for text, label in documents:
            writer.add_text(text, label)
    return prefix


def write_megatron(prefix, sequences, boundaries, code=8, dtype="<u2", modes=b""):
    """Write what the format's description says, with struct alone."""
    (prefix.parent / (prefix.name + ".bin")).write_bytes(b"".join(np.array(s, dtype=dtype).tobytes() for s in sequences))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += len(sequence) * np.dtype(dtype).itemsize
    index += struct.pack(f"<{len(boundaries)}q", *boundaries) + modes
    (prefix.parent / (prefix.name + ".idx")).write_bytes(index)
    return prefix


def test_documents_come_back(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "d"))
    tokenizer = ByteTokenizer()
    assert len(dataset) == 4
    for i, (text, label) in enumerate(DOCUMENTS):
        ids = dataset.document(i)
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids) == text
        assert dataset.label_names[dataset.label(i)] == label
    assert dataset.label_names == ("unknown", "a", "b", "c")
    assert dataset.sidecar.num_bytes == sum(len(t.encode()) for t, _ in DOCUMENTS)
    assert dataset.sidecar.num_tokens == dataset.num_tokens == dataset.sidecar.num_bytes + 4
    for i in (-1, 4):
        with pytest.raises(IndexError):
            dataset.document(i)


def test_written_bytes_are_the_format_of_megatron(tmp_path):
    with DatasetWriter(tmp_path / "ours", ByteTokenizer()) as writer:
        writer.add(np.array([1, 2, 3]))
        writer.add(np.array([256]))
    assert (tmp_path / "ours.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 0, 1])
    expected = (
        b"MMIDIDX\x00\x00"  # magic
        b"\x01\0\0\0\0\0\0\0"  # version
        b"\x08"  # uint16
        b"\x02\0\0\0\0\0\0\0"  # sequences
        b"\x03\0\0\0\0\0\0\0"  # documents + 1
        b"\x03\0\0\0\x01\0\0\0"  # lengths in tokens
        b"\0\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0"  # offsets in bytes
        b"\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"  # first sequence of each document, and the end
    )
    assert (tmp_path / "ours.idx").read_bytes() == expected


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatron_files_with_many_sequences_per_document_are_read(tmp_path, code, dtype):
    sequences = [[1, 2, 3], [4], [], [5, 6], [], [7]]
    dataset = IndexedDataset(write_megatron(tmp_path / "m_text_document", sequences, [0, 2, 2, 5, 6], code, dtype))
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [[1, 2, 3, 4], [], [5, 6], [7]]
    assert dataset.sidecar is None
    assert dataset.label_names == ("unknown",)
    assert [dataset.label(i) for i in range(4)] == [0, 0, 0, 0]
    assert load_dataset_tokenizer(tmp_path / "m_text_document") is None
    starts, labels = dataset.documents_in(2, 7)
    assert starts.tolist() == [0, 4, 6, 7]
    assert labels.tolist() == [0, 0, 0]


def test_a_prefix_may_have_dots_and_be_given_as_a_file(tmp_path):
    write(tmp_path / "v1.5.data")
    for name in ("v1.5.data", "v1.5.data.bin", "v1.5.data.idx"):
        assert len(IndexedDataset(tmp_path / name)) == 4


def test_large_vocabularies_get_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 65500

        def byte_lengths(self):
            return np.ones(self.vocab_size, dtype=np.int64)

    with DatasetWriter(tmp_path / "wide", Wide()) as writer:
        writer.add(np.array([65499, 0]))
    assert IndexedDataset(tmp_path / "wide").dtype == np.dtype("<i4")
    assert IndexedDataset(tmp_path / "wide").document(0).tolist() == [65499, 0]
    Wide.vocab_size = 65499
    with DatasetWriter(tmp_path / "narrow", Wide()) as writer:
        writer.add(np.array([65498]))
    assert IndexedDataset(tmp_path / "narrow").dtype == np.dtype("<u2")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
@settings(deadline=None, max_examples=60)
def test_documents_in_a_range_match_a_plain_search(tmp_path_factory, lengths, data):
    total = sum(lengths)
    if total == 0:
        return
    prefix = tmp_path_factory.mktemp("range") / "d"
    dataset = IndexedDataset(write_megatron(prefix, [[7] * n for n in lengths], range(len(lengths) + 1)))
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    ends = np.cumsum(lengths)
    touched = [i for i, n in enumerate(lengths) if n and ends[i] - n < stop and ends[i] > start]
    starts, labels = dataset.documents_in(start, stop)
    assert starts.tolist() == [ends[i] - lengths[i] for i in touched] + [ends[touched[-1]]]
    assert len(labels) == len(touched)
    assert dataset.count_ends(start, stop) == sum(1 for i, n in enumerate(lengths) if n and start < ends[i] <= stop)


# Damage


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.idx does not exist"):
        IndexedDataset(tmp_path / "absent")
    write(tmp_path / "d")
    (tmp_path / "d.labels").unlink()
    with pytest.raises(UserError, match=r"d\.labels does not exist"):
        IndexedDataset(tmp_path / "d")
    (tmp_path / "d.bin").unlink()
    with pytest.raises(UserError, match=r"d\.bin does not exist"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".labels", ".json"])
@pytest.mark.parametrize("kept", [0, 1, 8, 20, 33, 34, 0.5, -1, -2, -4, -8])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    write(tmp_path / "d")
    path = tmp_path / f"d{suffix}"
    content = path.read_bytes()
    cut = content[: int(len(content) * kept) if isinstance(kept, float) else kept]
    if cut == content or (suffix == ".json" and cut == content.rstrip()):
        return
    path.write_bytes(cut)
    with pytest.raises(UserError, match="d" + suffix.replace(".", r"\.")):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".labels"])
def test_a_longer_file_is_refused(tmp_path, suffix):
    write(tmp_path / "d")
    with (tmp_path / f"d{suffix}").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError):
        IndexedDataset(tmp_path / "d")


def read_everything(prefix):
    dataset = IndexedDataset(prefix)
    documents = [dataset.document(i).tolist() for i in range(len(dataset))]
    labels = [dataset.label_names[dataset.label(i)] for i in range(len(dataset))]
    found = [dataset.documents_in(i, i + 3)[0].tolist() for i in range(0, dataset.num_tokens - 3, 31)]
    return documents, labels, found


@pytest.mark.parametrize("suffix", [".idx", ".labels"])
def test_flipping_any_bit_of_an_index_is_an_error_or_harmless(tmp_path, suffix):
    write(tmp_path / "d")
    path = tmp_path / f"d{suffix}"
    content = path.read_bytes()
    documents, _, found = read_everything(tmp_path / "d")
    refused = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            again = read_everything(tmp_path / "d")
        except UserError:
            refused += 1
        else:
            # A label may become another one; tokens and their documents may not change.
            assert suffix == ".labels"
            assert again[0] == documents
            assert again[2] == found
    assert refused == 8 * len(content) if suffix == ".idx" else refused > 7 * len(content)


def test_random_damage_never_yields_foreign_ids(tmp_path):
    write(tmp_path / "d")
    files = {s: (tmp_path / f"d{s}").read_bytes() for s in (".idx", ".bin", ".labels", ".json")}
    rng = random.Random(0)
    for _ in range(600):
        suffix = rng.choice(list(files))
        damaged = bytearray(files[suffix])
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        (tmp_path / f"d{suffix}").write_bytes(damaged[: rng.choice([None, None, rng.randrange(len(damaged))])])
        try:
            documents, _, _ = read_everything(tmp_path / "d")
        except UserError:
            pass
        else:
            assert all(0 <= t < 257 for d in documents for t in d)
        (tmp_path / f"d{suffix}").write_bytes(files[suffix])


def test_damage_beyond_the_windows_checked_on_opening_is_found_when_read(tmp_path):
    n = 1_000_000
    sizes = np.full(n, 2, dtype="<i4")
    offsets = np.arange(n, dtype="<i8") * 4
    offsets[5_000] += 4
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, n, n + 1)
    index = header + sizes.tobytes() + offsets.tobytes() + np.arange(n + 1, dtype="<i8").tobytes()
    (tmp_path / "big.idx").write_bytes(index)
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(4 * n)
    dataset = IndexedDataset(tmp_path / "big")
    assert dataset.documents_in(40_000, 40_004)[0].tolist() == [40_000, 40_002, 40_004]
    with pytest.raises(UserError, match="damaged"):
        dataset.documents_in(9_999, 10_003)


def test_opening_a_terabyte_is_quick_and_takes_no_memory(tmp_path):
    tokens = 2**39
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 512, 513)
    sizes = np.full(512, 2**30, dtype="<i4")
    (tmp_path / "t.idx").write_bytes(
        index + sizes.tobytes() + (np.arange(512, dtype="<i8") * 2**31).tobytes() + np.arange(513, dtype="<i8").tobytes()
    )
    try:
        with (tmp_path / "t.bin").open("wb") as file:
            file.truncate(2 * tokens)
    except OSError:
        pytest.skip("the file system has no sparse files of 1 TB")
    dataset = IndexedDataset(tmp_path / "t")
    assert dataset.num_tokens == tokens
    assert dataset.read(tokens - 4, tokens).tolist() == [0, 0, 0, 0]
    assert dataset.documents_in(2**38 - 1, 2**38 + 1)[0].tolist() == [2**38 - 2**30, 2**38, 2**38 + 2**30]
    assert dataset.fingerprint


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"offset": 0, "value": b"X"}, "no Megatron index"),
        ({"offset": 9, "value": b"\x02"}, "version 2"),
        ({"offset": 17, "value": b"\x07"}, "float32"),
        ({"offset": 17, "value": b"\x2a"}, "type code 42"),
        ({"offset": 18, "value": b"\xff" * 8}, "need"),
    ],
)
def test_wrong_headers_say_what_is_wrong(tmp_path, change, match):
    prefix = write_megatron(tmp_path / "m", [[1], [2]], [0, 1, 2])
    content = bytearray((tmp_path / "m.idx").read_bytes())
    content[change["offset"] : change["offset"] + len(change["value"])] = change["value"]
    (tmp_path / "m.idx").write_bytes(content)
    with pytest.raises(UserError, match=match):
        IndexedDataset(prefix)


def test_other_kinds_of_wrong_megatron_files(tmp_path):
    with pytest.raises(UserError, match="multimodal"):
        IndexedDataset(write_megatron(tmp_path / "m", [[1], [2]], [0, 1, 2], modes=b"\0\1"))
    with pytest.raises(UserError, match="documents go from"):
        IndexedDataset(write_megatron(tmp_path / "m", [[1], [2]], [0, 1]))
    with pytest.raises(UserError, match="do not rise"):
        IndexedDataset(write_megatron(tmp_path / "m", [[1], [2]], [0, 2, 1, 2]))
    with pytest.raises(UserError, match="need"):
        IndexedDataset(write_megatron(tmp_path / "m", [[1]], []))
    negative = IndexedDataset(write_megatron(tmp_path / "m", [[1, -1]], [0, 1], code=4, dtype="<i4"))
    with pytest.raises(UserError, match="id -1 at token 1"):
        negative.document(0)


def test_a_file_that_ends_inside_a_token_is_refused_even_if_the_index_says_so(tmp_path):
    prefix = write_megatron(tmp_path / "odd", [[1], [2]], [0, 1, 2])
    path = tmp_path / "odd.idx"
    path.write_bytes(path.read_bytes().replace(struct.pack("<2q", 0, 2), struct.pack("<2q", 0, 3)))
    with (tmp_path / "odd.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="no whole number of tokens of 2 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_names_that_no_file_can_have_are_refused(name):
    with pytest.raises(UserError, match="dataset file"):
        IndexedDataset(name)
    with pytest.raises(UserError, match="dataset sidecar"):
        load_dataset_tokenizer(name)


def test_ids_outside_the_model_are_refused(tmp_path):
    prefix = write_megatron(tmp_path / "m", [[5, 300, 5]], [0, 1])
    assert IndexedDataset(prefix).document(0).tolist() == [5, 300, 5]
    with pytest.raises(UserError, match="id 300 at token 1"):
        IndexedDataset(prefix, vocab_size=300).document(0)
    write(tmp_path / "d")
    with pytest.raises(UserError, match=r"set model\.vocab_size to at least 257"):
        IndexedDataset(tmp_path / "d", vocab_size=256)


# Writing


@pytest.mark.parametrize("edit", [lambda s: {**s, "format": "x"}, lambda s: {**s, "version": 9}, lambda s: {**s, "extra": 1}])
def test_sidecars_of_others_and_of_other_versions_are_refused(tmp_path, edit):
    write(tmp_path / "d")
    path = tmp_path / "d.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=r"d\.json"):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize(
    "key", ["tokenizer", "fingerprint", "vocab_size", "eod", "label_names", "num_tokens", "tokenizer_file"]
)
def test_sidecars_with_a_wrong_or_missing_entry_are_refused(tmp_path, key):
    write(tmp_path / "d")
    path = tmp_path / "d.json"
    fields = json.loads(path.read_text())
    for value in (None, True, [1], 2**70, "../x"):
        if fields[key] is None and value is None:
            continue
        path.write_text(json.dumps({**fields, key: value}))
        if isinstance(value, str) and isinstance(fields[key], str):
            continue
        if key == "vocab_size" and value == 2**70:
            continue
        with pytest.raises(UserError):
            IndexedDataset(tmp_path / "d")
    del fields[key]
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=key):
        IndexedDataset(tmp_path / "d")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000])
def test_a_sidecar_that_json_cannot_hold_is_refused_and_not_replaced(tmp_path, content):
    write(tmp_path / "d")
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(UserError, match=r"d\.json is no JSON"):
        IndexedDataset(tmp_path / "d")
    with pytest.raises(UserError, match="belongs to no dataset of ours"):
        write(tmp_path / "d")


def test_a_sidecar_names_no_file_of_another_folder(tmp_path):
    write(tmp_path / "d")
    (tmp_path / "secret").write_text("not for readers of datasets")
    path = tmp_path / "d.json"
    fields = json.loads(path.read_text())
    for edit in ({"tokenizer": str(tmp_path / "secret")}, {"tokenizer_file": ""}, {"tokenizer_file": ".."}):
        path.write_text(json.dumps(fields | edit))
        with pytest.raises(UserError) as caught:
            load_dataset_tokenizer(tmp_path / "d")
        assert "tokenizer" in str(caught.value)
        assert "SentencePiece" not in str(caught.value)  # it was not read


def test_a_sidecar_of_another_dataset_is_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", DOCUMENTS[:2])
    os.replace(tmp_path / "b.json", tmp_path / "a.json")
    with pytest.raises(UserError, match="different datasets"):
        IndexedDataset(tmp_path / "a")


def test_equal_documents_give_equal_files(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    for suffix in (".bin", ".idx", ".labels", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert IndexedDataset(tmp_path / "a").fingerprint == IndexedDataset(tmp_path / "b").fingerprint
    write(tmp_path / "c", [("onf", "a"), *DOCUMENTS[1:]])
    assert IndexedDataset(tmp_path / "a").fingerprint != IndexedDataset(tmp_path / "c").fingerprint


def test_an_exception_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def fail(prefix):
        with DatasetWriter(prefix, ByteTokenizer()) as writer:
            writer.add_text("new")
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        fail(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(KeyError):
        fail(tmp_path / "old")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_our_own_dataset_is_replaced_and_no_other_file(tmp_path):
    write(tmp_path / "d")
    write(tmp_path / "d", [("new", "x")])
    assert len(IndexedDataset(tmp_path / "d")) == 1
    (tmp_path / "raw.json").write_text('{"text": "precious"}')
    write_megatron(tmp_path / "megatron", [[1]], [0, 1])
    for name in ("raw", "megatron"):
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(UserError, match="choose another output"):
            write(tmp_path / name)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document"), DatasetWriter(tmp_path / "d", ByteTokenizer()):
        pass
    for ids in (np.array([], dtype=np.int64), np.array([257]), np.array([-1])):
        with pytest.raises(UserError), DatasetWriter(tmp_path / "d", ByteTokenizer()) as writer:
            writer.add(ids)
    assert not list(tmp_path.iterdir())


def test_label_numbers_can_be_fixed(tmp_path):
    write(tmp_path / "d", [("x", "b")], label_names=["a", "b"])
    assert IndexedDataset(tmp_path / "d").label_names == ("unknown", "a", "b")
    assert IndexedDataset(tmp_path / "d").label(0) == 2


def test_the_tokenizer_travels_with_the_dataset(tmp_path):
    trained = train_sentencepiece([f"some words {i}\n" for i in range(200)], tmp_path / "tokenizer", 300)
    write(tmp_path / "folder" / "d", tokenizer=trained)
    (tmp_path / "tokenizer").unlink()
    moved = tmp_path / "moved"
    (tmp_path / "folder").rename(moved)
    tokenizer = load_dataset_tokenizer(moved / "d")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.fingerprint == trained.fingerprint
    assert tokenizer.decode(IndexedDataset(moved / "d").document(3)) == "été"
    train_sentencepiece([f"other words {i}\n" for i in range(200)], moved / "d.model", 300)
    with pytest.raises(UserError, match="was made with tokenizer"):
        load_dataset_tokenizer(moved / "d")
    (moved / "d.model").unlink()
    with pytest.raises(UserError, match=r"d\.model"):
        load_dataset_tokenizer(moved / "d")
    write(tmp_path / "bytes")
    assert load_dataset_tokenizer(tmp_path / "bytes").fingerprint == load_tokenizer("bytes").fingerprint
