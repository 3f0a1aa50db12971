"""Tokenizers whose vocabulary comes from a corpus or from Hugging Face: what they keep, what they refuse, and their files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from moe_train.data.characters import CharacterTokenizer
from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.pretrained import PretrainedTokenizer
from moe_train.data.tokenizer import load_tokenizer
from moe_train.data.words import WordTokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

# As WikiText-103's files are written: a space before each word and each end of a line.
WIKI = " \n = Title = \n \n the cat <unk> the end . \n the naïve cat \n"
TEXTS = [f"def function_{i}(self, x):\n    return self.value_{i}  +  {i}\n\n# naïve café {i}\n" for i in range(300)]


def byte_level(end="<|endoftext|>"):
    """A tokenizer.json as GPT-2's, small."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    return fast


def byte_fallback():
    """A tokenizer.json as Gemma's, small."""
    pieces = ["<unk>", "<eos>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
    merges = [("▁", "a"), ("a", "b")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    fast = Fast(model)
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    return fast


def prepended():
    """As Mixtral's: a space before the text, and byte fallback."""
    fast = byte_fallback()
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast


def metaspace():
    """As later files of the same models: a space before the text, unless it begins with one."""
    fast = byte_fallback()
    fast.normalizer = None
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast


def content(fast, **edit):
    return json.dumps({**json.loads(fast.to_str()), **edit}).encode()


def examples():
    return [
        (CharacterTokenizer(b"cab\n "), "a b\n"),
        (WordTokenizer.read([WIKI.encode()]), WIKI),
        (PretrainedTokenizer(content(byte_level())), TEXTS[0]),
        (PretrainedTokenizer(content(byte_fallback())), "ab  é\n"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_saved_tokenizer_is_the_same_and_travels_with_its_dataset(tmp_path, number):
    tokenizer, text = examples()[number]
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.name, loaded.vocab_size, loaded.eod) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eod)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    with DatasetWriter(tmp_path / "d", loaded) as writer:
        writer.add_text(text)
    assert load_dataset_tokenizer(tmp_path / "d").fingerprint == tokenizer.fingerprint
    assert IndexedDataset(tmp_path / "d", tokenizer=tokenizer).sidecar.num_bytes == len(text.encode())
    with pytest.raises(UserError, match="was prepared with tokenizer"):
        IndexedDataset(tmp_path / "d", tokenizer=load_tokenizer("bytes"))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_decoding_an_id_out_of_range_is_an_error(number, bad):
    with pytest.raises(UserError, match=str(bad)):
        examples()[number][0].decode([bad])


# Characters


@given(st.lists(st.sampled_from(list(b"ab \n\xff"))).map(bytes))
@settings(deadline=None)
def test_characters_come_back(data):
    tokenizer = CharacterTokenizer.read([b"ab ", b"\n\xff"])
    assert tokenizer.vocab_size == 6
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes([*ids, tokenizer.eod]) == data
    assert tokenizer.byte_lengths()[ids].sum() == len(data)
    assert tokenizer.eod not in ids


def test_a_character_of_another_corpus_is_named_and_not_replaced():
    tokenizer = CharacterTokenizer.read([b"abcdefghijklmnopqrstuvwxyz "])
    assert tokenizer.vocab_size == 27 + 1
    with pytest.raises(UserError, match=r"byte 3 of a text is b'1', which is not among the 27 characters"):
        tokenizer.encode("abc123")
    with pytest.raises(UserError, match="no text"):
        CharacterTokenizer.read([b""])


# Words


def test_words_are_those_of_transformer_xl():
    tokenizer = WordTokenizer.read([WIKI.encode()])
    # <eos>, then by count, of equal counts the first to come before.
    words = ["<eos>", "the", "=", "cat", "Title", "<unk>", "end", ".", "naïve"]
    assert [tokenizer.decode([i]) for i in range(1, 9)] == [f" {word}" for word in words[1:]]
    ids = tokenizer.encode(WIKI)
    expected = [
        "<eos>",
        "=",
        "Title",
        "=",
        "<eos>",
        "<eos>",
        "the",
        "cat",
        "<unk>",
        "the",
        "end",
        ".",
        "<eos>",
        "the",
        "naïve",
        "cat",
    ]
    assert [words[i] for i in ids] == expected
    # With the end of the document it is the stream of the papers: <eos> after every line.
    assert tokenizer.decode([*ids, tokenizer.eod]) == WIKI


def test_a_vocabulary_of_the_size_of_wikitext_103_s(tmp_path):
    """267,735 words: more than uint16 holds, counted, saved and read again."""
    lines = (" ".join(f"w{i}" for i in range(start, min(start + 1000, 267_733))) for start in range(0, 267_733, 1000))
    text = "".join(f" {line} <unk> \n" for line in lines).encode()
    with DatasetWriter(tmp_path / "d", WordTokenizer.read([text])) as writer:
        writer.add_text(text)
    dataset, tokenizer = IndexedDataset(tmp_path / "d"), load_dataset_tokenizer(tmp_path / "d")
    assert tokenizer.vocab_size == dataset.sidecar.vocab_size == 267_735
    ids = dataset.document(0)
    assert set(ids.tolist()) == set(range(267_735))
    assert tokenizer.decode_bytes(ids) == text


def test_unknown_words_become_unk_and_white_space_is_not_kept():
    tokenizer = WordTokenizer.read([b"a b b c c c"], min_count=2)
    assert tokenizer.vocab_size == 4
    ids = tokenizer.encode("c  a\tb\nmore <eos>")
    assert tokenizer.decode(ids) == " c <unk> b \n <unk> \n"
    assert tokenizer.encode("").tolist() == tokenizer.encode("\n").tolist() == []
    with pytest.raises(UserError, match="no word that occurs 9 times"):
        WordTokenizer.read([b"a b"], min_count=9)


def test_words_of_bytes_that_are_no_text_are_kept(tmp_path):
    tokenizer = WordTokenizer.read([b"caf\xe9 x"])
    tokenizer.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").decode_bytes(tokenizer.encode(b"caf\xe9")) == b" caf\xe9"


# tokenizer.json


LOADED = PretrainedTokenizer(content(byte_level()))


@given(st.text())
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back_from_pieces_of_bytes(text):
    tokenizer = LOADED
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()


def test_ids_are_those_of_the_library():
    fast = byte_level()
    for text in TEXTS[:20]:
        assert LOADED.encode(text).tolist() == fast.encode(text, add_special_tokens=False).ids
    assert LOADED.vocab_size == fast.get_vocab_size()


def test_a_special_token_in_a_text_is_text():
    text = "a<|endoftext|>b"
    ids = LOADED.encode(text)
    assert LOADED.eod not in ids
    assert LOADED.decode(ids) == text
    assert LOADED.decode([LOADED.eod]) == ""


def test_truncation_and_padding_of_the_file_are_left_aside():
    fast = byte_level()
    fast.enable_truncation(4)
    fast.enable_padding(length=50)
    tokenizer = PretrainedTokenizer(fast.to_str().encode())
    assert tokenizer.encode(TEXTS[0]).tolist() == LOADED.encode(TEXTS[0]).tolist()


@pytest.mark.parametrize("make", [prepended, metaspace])
@pytest.mark.parametrize("text", ["ab", "a b\n é", "\U0001f9ff", "x <eos> y"])
def test_a_space_before_the_text_is_kept(make, text):
    tokenizer = PretrainedTokenizer(content(make()))
    ids = tokenizer.encode(text)
    fast = make()
    fast.encode_special_tokens = True
    assert ids.tolist() == fast.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " " + text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + 1


def test_what_is_left_aside_does_not_change_the_fingerprint():
    fast = byte_level()
    fast.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", LOADED.eod)])
    fast.enable_truncation(4)
    assert PretrainedTokenizer(content(fast)).fingerprint == LOADED.fingerprint
    assert PretrainedTokenizer(content(fast, normalizer={"type": "NFC"})).fingerprint != LOADED.fingerprint


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(UserError, match="byte 3 of a text is no valid UTF-8"):
        LOADED.encode(b"caf\xe9")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: content(byte_level("<stop>")), "no special token to end documents"),
        (lambda: content(byte_level(), decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder WordPiece"),
        (lambda: content(byte_level(), decoder=None), "decoder None"),
        (lambda: content(byte_level(), normalizer={"type": "Lowercase"}), "changes text"),
        (lambda: content(byte_level(), normalizer={"type": "NFKC"}), "changes text"),
        (lambda: content(byte_fallback(), normalizer={"type": "Prepend", "prepend": "x"}), "changes text"),
        (lambda: content(byte_level(), model={"type": "BPE", "vocab": {"a": 0}, "merges": []}), "no piece for some bytes"),
        (lambda: content(byte_level())[:-40], "damaged"),
        (lambda: b'{"model": 1}', "damaged"),
        (lambda: b'{"model": ' + b"[" * 100_000, "damaged"),
    ],
)
def test_files_that_lose_text_are_refused(tmp_path, make, match):
    (tmp_path / "t.json").write_bytes(make())
    with pytest.raises(UserError, match=match):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer": "characters"},
        {"tokenizer": "characters", "symbols": []},
        {"tokenizer": "characters", "symbols": [256]},
        {"tokenizer": "characters", "symbols": [True]},
        {"tokenizer": "words", "words": ["a"]},
        {"tokenizer": "words", "words": ["<eos>", "<unk>", "<unk>"]},
        {"tokenizer": "words", "words": ["<eos>", "<unk>", "a b"]},
        {"tokenizer": "words", "words": ["<eos>", "<unk>", 5]},
        {"tokenizer": "words", "words": ["<eos>", "<unk>", "\ud800"]},
        {"tokenizer": "other"},
        {},
    ],
)
def test_wrong_vocabularies_are_refused(tmp_path, fields):
    (tmp_path / "t").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="tokenizer file"):
        load_tokenizer(tmp_path / "t")
