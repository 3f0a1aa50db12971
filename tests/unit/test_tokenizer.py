"""Tokenizers: nothing of a text is lost, training repeats exactly, damaged files are refused."""

import subprocess
import sys
import time

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from moe_train.errors import UserError

TEXTS = [f"def function_{i}(self, x):\n    return self.value_{i}  +  {i}\n\n# naïve café {i}\n" for i in range(300)]
HOSTILE = [
    "",
    " ",
    "\n",
    "\x00",
    "\t\t",
    "\r\n\r",
    "▁",
    "▁ ▁▁  ▁",
    "▅",
    "</s>",
    "<unk>",
    "<0x41>",
    "\ufeff",
    "e\u0301",
    "ﬁ①",
    "🧿👩‍👩‍👧",
    "中文",
    "  x  ",
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(TEXTS, path, 400)
    return path


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, model_path):
    return load_tokenizer("bytes" if request.param == "bytes" else model_path)


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(st.binary())
@settings(deadline=None, max_examples=200)
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.byte_lengths()[ids].sum() == len(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()


@given(st.text(alphabet="▁ ab\n\ud800\udc80", max_size=8))
@settings(deadline=None)
def test_ids_are_in_range_and_never_the_end_of_a_document(tokenizer, text):
    if any("\ud800" <= c <= "\udfff" for c in text):
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert tokenizer.eod not in ids


def test_special_ids_stand_for_no_text(tokenizer):
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    assert tokenizer.byte_lengths()[tokenizer.eod] == 0
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eod, *tokenizer.encode("c")]) == "a bc"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_decoding_an_id_out_of_range_is_an_error(tokenizer, bad):
    with pytest.raises(UserError, match=str(bad)):
        tokenizer.decode([bad])


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (tokenizer.name, tokenizer.vocab_size, tokenizer.fingerprint)
    assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_character_cut_in_two_decodes_to_the_replacement_character():
    ids = ByteTokenizer().encode("é")
    assert ByteTokenizer().decode(ids[:1]) == "\ufffd"


def test_bytes_are_fast():
    data = bytes(range(256)) * 40_000
    start = time.process_time()
    ByteTokenizer().encode(data)
    assert len(data) / (time.process_time() - start) > 20e6


def test_training_repeats_exactly_in_another_process(model_path, tmp_path):
    again = train_sentencepiece(TEXTS, tmp_path / "again.model", 400)
    assert again.fingerprint == load_tokenizer(model_path).fingerprint
    code = (
        "import sys; from moe_train.data.tokenizer import train_sentencepiece as t; "
        "print(t(eval(sys.argv[1]), sys.argv[2], 400).fingerprint)"
    )
    command = [sys.executable, "-c", code, repr(TEXTS), str(tmp_path / "third.model")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == again.fingerprint


def test_pieces_are_shorter_than_bytes_and_may_hold_newlines(model_path):
    tokenizer = load_tokenizer(model_path)
    text = "".join(TEXTS)
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    assert any(b"\n" in piece and len(piece) > 1 for piece in pieces)


@pytest.mark.parametrize(
    ("texts", "size", "match"),
    [([], 400, "no text"), ([""], 400, "no text"), (TEXTS, 100, "100"), (TEXTS[:1], 100_000, "100000")],
)
def test_training_that_cannot_work_says_why(texts, size, match, tmp_path):
    with pytest.raises(UserError, match=match):
        train_sentencepiece(texts, tmp_path / "x.model", size)
    assert not list(tmp_path.iterdir())


def test_one_endless_line_trains(tmp_path):
    assert train_sentencepiece(["word " * 20_000], tmp_path / "x.model", 270).decode([]) == ""


def test_missing_and_wrong_files_are_refused(tmp_path):
    for content in (b"", b"hello", b'{"tokenizer": "wordz"}', b"\x00" * 100, b"\xff" * 5000):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(UserError):
            load_tokenizer(path)
    with pytest.raises(UserError, match="neither 'bytes' nor a file"):
        load_tokenizer(tmp_path / "absent.model")
    for name in (tmp_path, "a\0b", "\ud800", "x" * 5000, "/proc/self/mem"):
        with pytest.raises(UserError):
            load_tokenizer(name)


def test_every_truncation_of_a_model_is_refused_or_harmless(model_path):
    model = model_path.read_bytes()
    whole = SentencePieceTokenizer.from_bytes(model)
    for cut in {*range(0, len(model), 211), *range(len(model) - 400, len(model))}:
        try:
            tokenizer = SentencePieceTokenizer.from_bytes(model[:cut])
        except UserError:
            continue
        assert tokenizer.encode(TEXTS[0]).tolist() == whole.encode(TEXTS[0]).tolist(), cut


LOSSLESS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "eos_id": 1,
    "unk_id": 0,
    "bos_id": -1,
    "pad_id": -1,
}


def train_with(path, **options):
    """A model as somebody else may train it."""
    lines = iter(TEXTS)
    options = LOSSLESS | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=path, vocab_size=400, model_type="bpe", minloglevel=2, **options
    )
    return load_tokenizer(f"{path}.model")


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    """As Llama's and Mixtral's."""
    return train_with(str(tmp_path_factory.mktemp("prefixed") / "t"), add_dummy_prefix=True)


@given(st.binary())
@settings(deadline=None, max_examples=100)
def test_a_model_may_put_a_space_before_a_text(prefixed, data):
    ids = prefixed.encode(data)
    assert prefixed.decode_bytes(ids) == b" " * bool(data) + data
    assert prefixed.byte_lengths()[ids].sum() == len(data) + bool(data)


def test_a_space_before_a_text_gives_sentencepiece_s_own_ids(prefixed, tmp_path):
    prefixed.save(tmp_path / "t.model")
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for text in (*TEXTS[:20], "self", " self", "  x\n", "\U0001f9ff", ""):
        assert prefixed.encode(text).tolist() == theirs.encode(text)


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"eos_id": -1}, "end-of-sentence"),
    ],
)
def test_a_model_that_loses_text_is_refused(tmp_path, settings_, match):
    with pytest.raises(UserError, match=match):
        train_with(str(tmp_path / "lossy"), **settings_)
