"""The corpora of papers: cut as the papers cut them, and other files are refused. Here with files of the same form, but small."""

import hashlib
import string

import pytest

from moe_train.data import recipes
from moe_train.data.indexed import IndexedDataset, load_dataset_tokenizer
from moe_train.data.recipes import RECIPES, Characters, Words, prepare_recipe
from moe_train.errors import UserError

TEXT = (string.ascii_lowercase + " ").encode() * 4  # 108 bytes


@pytest.fixture
def small(monkeypatch):
    """The recipes with small sizes, and the cuts, patterns and options that they have."""
    text8 = Characters(27, hashlib.md5(TEXT).hexdigest(), (90, 9, 9))
    wiki = Words(RECIPES["wikitext-103"].files, {"train": 10, "valid": 6, "test": 5}, words=5)
    names = {split: (pattern, min(count, 2)) for split, (pattern, count) in RECIPES["lm1b"].files.items()}
    lm1b = Words(names, {"train": 12}, min_count=3, lines=True)
    monkeypatch.setattr(recipes, "RECIPES", {"text8": text8, "wikitext-103": wiki, "lm1b": lm1b})


def read(prefix):
    dataset = IndexedDataset(prefix)
    tokenizer = load_dataset_tokenizer(prefix)
    return [tokenizer.decode(dataset.document(i)) for i in range(len(dataset))]


def test_published_numbers():
    assert RECIPES["enwik8"].cuts == RECIPES["text8"].cuts == (90_000_000, 5_000_000, 5_000_000)
    assert (RECIPES["enwik8"].symbols, RECIPES["text8"].symbols, RECIPES["wikitext-103"].words) == (205, 27, 267_735)


def test_characters(tmp_path, small):
    (tmp_path / "text8").write_bytes(TEXT)
    summaries = prepare_recipe("text8", tmp_path / "text8", tmp_path / "out")
    assert "".join(read(tmp_path / "out" / split)[0] for split in ("train", "valid", "test")) == TEXT.decode()
    assert {split: s.tokens for split, s in summaries.items()} == {"train": 91, "valid": 10, "test": 10}
    assert IndexedDataset(tmp_path / "out/valid").sidecar.vocab_size == 28
    fingerprints = {load_dataset_tokenizer(tmp_path / "out" / split).fingerprint for split in summaries}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(("text", "match"), [(TEXT[:-1], "107 bytes, the published file 108"), (TEXT[::-1], "has the MD5")])
def test_another_file_is_refused(tmp_path, small, text, match):
    (tmp_path / "text8").write_bytes(text)
    with pytest.raises(UserError, match=match):
        prepare_recipe("text8", tmp_path / "text8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot read"):
        prepare_recipe("text8", tmp_path / "absent", tmp_path / "out")


def write_wiki(folder, train=" \n = A = \n \n x x <unk> \n"):
    for split, text in (("train", train), ("valid", " \n = A \n x \n"), ("test", " = x \n x \n")):
        (folder / f"wiki.{split}.tokens").write_text(text)


def test_words(tmp_path, small):
    write_wiki(tmp_path)
    prepare_recipe("wikitext-103", tmp_path, tmp_path / "out")
    assert read(tmp_path / "out/train") == [" \n = A = \n \n x x <unk> \n"]
    assert read(tmp_path / "out/test") == [" = x \n x \n"]


def test_words_with_other_counts_are_refused(tmp_path, small):
    write_wiki(tmp_path, " \n = A = \n \n x x <unk> x \n")
    with pytest.raises(UserError, match="train has 11 words and ends of lines, the published one 10"):
        prepare_recipe("wikitext-103", tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    write_wiki(tmp_path, " = A x y \n")
    with pytest.raises(UserError, match="a vocabulary of"):
        prepare_recipe("wikitext-103", tmp_path, tmp_path / "out")
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(UserError, match=r"has 0 files wiki\.test\.tokens, the published folder 1"):
        prepare_recipe("wikitext-103", tmp_path, tmp_path / "out")


def test_sentences(tmp_path, small):
    train, held_out = tmp_path / recipes._TRAIN, tmp_path / recipes._HELD_OUT
    train.mkdir()
    held_out.mkdir()
    (train / "news.en-00001-of-00100").write_text("a b a\nb c\n")
    (train / "news.en-00002-of-00100").write_text("a b c c\n")
    for i in range(3):
        (held_out / f"news.en.heldout-0000{i}-of-00050").write_text(f"a b held{i}\n")
    prepare_recipe("lm1b", tmp_path, tmp_path / "out")
    assert read(tmp_path / "out/train") == [" a b a \n", " b c \n", " a b c c \n"]
    assert read(tmp_path / "out/test") == [" a b <unk> \n"]


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="'ptb' is not known; choose one of enwik8"):
        prepare_recipe("ptb", tmp_path, tmp_path)
