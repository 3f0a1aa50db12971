"""Corpora that papers use, from the files that their authors publish: how they are cut, and whether the files are the right ones.

Nothing is downloaded. Hashes of enwik8 and text8 are those of Mahoney's Large Text Compression Benchmark
(http://mattmahoney.net/dc/text.html, textdata.html); counts of words those of Merity et al. 2016 (arXiv:1609.07843) for WikiText-103
and of Chelba et al. 2013 (arXiv:1312.3005) for lm1b.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_train.data.characters import CharacterTokenizer
from moe_train.data.inputs import OWN, Inputs
from moe_train.data.prepare import Summary, prepare
from moe_train.data.tokenizer import Tokenizer
from moe_train.data.words import WordTokenizer
from moe_train.errors import UserError
from moe_train.files import write_atomically

Prepare = Callable[[Inputs, Path, Tokenizer], Summary]


@dataclasses.dataclass(frozen=True)
class Characters:
    """A file of 100,000,000 bytes in one piece: 90M to train on, 5M to validate, 5M to test (Graves 2013; Al-Rfou et al. 2018)."""

    symbols: int  # different byte values
    md5: str
    cuts: tuple[int, ...] = (90_000_000, 5_000_000, 5_000_000)

    def splits(self, path: Path, folder: Path) -> tuple[Tokenizer, dict[str, Inputs]]:
        """Write the parts of the file below `folder`, and return the tokenizer with what the splits are made of."""
        text = _read(path)
        size = sum(self.cuts)
        if len(text) != size:
            raise UserError(f"{path} has {len(text)} bytes, the published file {size}; give the unpacked file")
        if (found := hashlib.md5(text, usedforsecurity=False).hexdigest()) != self.md5:
            raise UserError(f"{path} has the MD5 {found}, the published file {self.md5}; copy it again")
        tokenizer = CharacterTokenizer.read([text])
        if tokenizer.eod != self.symbols:
            raise UserError(f"{path} has {tokenizer.eod} different bytes, the published file {self.symbols}")
        inputs, start = {}, 0
        for split, count in zip(("train", "valid", "test"), self.cuts, strict=True):
            write_atomically(folder / f"{split}.txt", text[start : start + count])
            inputs[split] = Inputs([folder / f"{split}.txt"])
            start += count
        return tokenizer, inputs

    def check(self, split: str, summary: Summary) -> None:
        """Nothing more: the hash has said it."""


@dataclasses.dataclass(frozen=True)
class Words:
    """Files of words between spaces; the vocabulary is read from the training files."""

    files: dict[str, tuple[str, int]]  # split -> a pattern in the folder, and how many files it finds
    tokens: dict[str, int]  # split -> words and ends of lines
    words: int | None = None  # in the vocabulary, `<unk>` and `<eos>` among them
    min_count: int = 1
    lines: bool = False  # each line is a document

    def splits(self, path: Path, folder: Path) -> tuple[Tokenizer, dict[str, Inputs]]:
        """Find the files, and return the tokenizer with what the splits are made of."""
        inputs = {}
        for split, (pattern, count) in self.files.items():
            found = sorted(path.glob(pattern))
            if len(found) != count:
                raise UserError(
                    f"{path} has {len(found)} files {pattern}, the published folder {count}; give the unpacked folder"
                )
            inputs[split] = Inputs(found, lines=self.lines)
        texts = (text for file in inputs["train"].files() for text in _blocks(file))
        tokenizer = WordTokenizer.read(texts, self.min_count)
        if self.words is not None and tokenizer.vocab_size != self.words:
            raise UserError(
                f"{path} has a vocabulary of {tokenizer.vocab_size} words, the published one {self.words}; "
                "give the word-level files (not the raw ones)"
            )
        return tokenizer, inputs

    def check(self, split: str, summary: Summary) -> None:
        """Raise UserError when a split has another number of words than the published one."""
        if (expected := self.tokens.get(split)) not in (None, summary.tokens):
            raise UserError(
                f"{split} has {summary.tokens} words and ends of lines, the published one {expected}; copy it again"
            )


_TRAIN, _HELD_OUT = "training-monolingual.tokenized.shuffled", "heldout-monolingual.tokenized.shuffled"
RECIPES: dict[str, Characters | Words] = {
    "enwik8": Characters(205, "a1fa5ffddb56f4953e226637dabbb36a"),
    "text8": Characters(27, "3bea1919949baf155f99411df5fada7e"),
    "wikitext-103": Words(
        {split: (f"wiki.{split}.tokens", 1) for split in ("train", "valid", "test")},
        {"train": 103_227_021, "valid": 217_646, "test": 245_569},
        words=267_735,
    ),
    # 768,648,884 words in 30,301,028 sentences. Held-out file 0 is the test set of the literature, file 1 serves for validation.
    "lm1b": Words(
        {
            "train": (f"{_TRAIN}/news.en-000??-of-00100", 99),
            "valid": (f"{_HELD_OUT}/news.en.heldout-00001-of-00050", 1),
            "test": (f"{_HELD_OUT}/news.en.heldout-00000-of-00050", 1),
        },
        {"train": 768_648_884 + 30_301_028},
        min_count=3,
        lines=True,
    ),
}


def prepare_recipe(name: str, path: Path, folder: Path, run: Prepare = prepare) -> dict[str, Summary]:
    """Write the datasets train, valid and test of a corpus below `folder`; the summary of each.

    Raises UserError when the files at `path` are not the published ones; a split with a wrong count is removed again.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not known; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    tokenizer, inputs = recipe.splits(path, folder)
    summaries = {}
    for split, source in inputs.items():
        summaries[split] = run(source, folder / split, tokenizer)
        try:
            recipe.check(split, summaries[split])
        except UserError:
            for suffix in (".idx", *OWN):  # the index first: without it there is no dataset
                (folder / f"{split}{suffix}").unlink(missing_ok=True)
            raise
    return summaries


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _blocks(path: Path) -> Iterator[bytes]:
    """Read a file in blocks that end with a line."""
    try:
        with path.open("rb") as file:
            while lines := file.readlines(1 << 24):
                yield b"".join(lines)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
