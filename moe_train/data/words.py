"""One id per word of a corpus that is words between spaces already, as WikiText-103 (267,735 of them) and lm1b are.

The vocabulary is Transformer-XL's (Dai et al. 2019, arXiv:1901.02860): `<eos>`, then the words by falling count, of equal counts the
one that came first before, so that adaptive softmax can cut it where frequencies fall. A word is what `str.split` finds.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_train.data.tokenizer import Ids, Tokenizer, utf8
from moe_train.errors import UserError
from moe_train.files import write_atomically

UNKNOWN, END = "<unk>", "<eos>"


class WordTokenizer(Tokenizer):
    """Words, `<unk>` for every other word, and `<eos>` for the end of a line.

    The end of a document is its last line's `<eos>`: `encode` leaves that one out, as it leaves out every end of a document. Text
    comes back as WikiText writes it: a space before each word and before each end of a line. Other white space is not kept, nor are
    unknown words, so `decode_bytes(encode(x)) == x` holds for WikiText's own files only; bytes are counted in this form.
    """

    name = "words"
    suffix = ".vocab"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        self.eod, self._unknown = self._ids[END], self._ids[UNKNOWN]
        self._pieces = [_raw(" " + word) for word in self._words]
        self._pieces[self.eod] = b" \n"

    @classmethod
    def read(cls, texts: Iterable[bytes], min_count: int = 1) -> "WordTokenizer":
        """The words that occur at least `min_count` times in texts. Raises UserError when there are none."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_text(text).split())
        kept = [word for word, count in counts.most_common() if count >= min_count and word != END]
        if not kept:
            raise UserError(f"there is no word that occurs {min_count} times in the text; lower the count, or add text")
        return cls([END, *kept] if UNKNOWN in kept else [END, *kept, UNKNOWN])

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of the words and of the ends of lines but the last one, int32 [tokens]."""
        lines = _text(utf8(text)).split("\n")
        if lines[-1] == "":
            lines.pop()
        ids: list[int] = []
        find, unknown = self._ids.get, self._unknown
        for line in lines:
            ids += [find(word, unknown) for word in line.split()]
            ids.append(self.eod)
        return np.array(ids[:-1], dtype=np.int32)

    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the words, each after a space, and ` \\n` for each end of a line."""
        return b"".join([self._pieces[i] for i in self._checked(ids).tolist()])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the length of each word with its space, [vocab_size]; `<eos>` has 2."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the file that `save` writes."""
        return "sha256-" + hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return json.dumps({"tokenizer": self.name, "words": self._words}, indent=0).encode() + b"\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that lists the words in the order of ids."""
        write_atomically(path, self._content())

    @classmethod
    def from_json(cls, fields: object, source: str) -> "WordTokenizer":
        """Make a tokenizer of the list in a file that `save` wrote; `source` names it in errors."""
        if not isinstance(fields, list) or not all(isinstance(w, str) and w.split() == [w] for w in fields):
            raise UserError(f"tokenizer file {source}: words must be a list of words; read them from the corpus again")
        if len(set(fields)) < len(fields) or not {END, UNKNOWN} <= set(fields):
            raise UserError(f"tokenizer file {source}: words must be different, {END} and {UNKNOWN} among them")
        try:
            return cls(fields)
        except UnicodeEncodeError:
            raise UserError(f"tokenizer file {source}: has a lone surrogate in a word; read the words again") from None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")
