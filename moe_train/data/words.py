"""One id per word of a corpus that is words between spaces already, as WikiText-103 (267,735 of them) and lm1b are.

The vocabulary is Transformer-XL's (Dai et al. 2019, arXiv:1901.02860): `<eos>`, then the words by falling count, of equal counts the
one that came first before, so that adaptive softmax can cut it where frequencies fall. A word is what `str.split` finds.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from moe_train.data.tokenizer import Ids, PieceTokenizer, utf8
from moe_train.errors import UserError

UNKNOWN, END = "<unk>", "<eos>"


class WordTokenizer(PieceTokenizer):
    """Words, `<unk>` for every other word, and `<eos>` for the end of a line.

    The end of a document is its last line's `<eos>`: `encode` leaves that one out, as it leaves out every end of a document. Text
    comes back as WikiText writes it: a space before each word and before each end of a line. Other white space is not kept, nor are
    unknown words, so `decode_bytes(encode(x)) == x` holds for WikiText's own files only; bytes are counted in this form.
    """

    name = "words"
    suffix = ".vocab"

    def __init__(self, words: Sequence[str]) -> None:
        self._ids = {word: i for i, word in enumerate(words)}
        self.vocab_size = len(words)
        self.eod, self._unknown = self._ids[END], self._ids[UNKNOWN]
        self._pieces = [_raw(" " + word) for word in words]
        self._pieces[self.eod] = b" \n"
        self.content = json.dumps({"tokenizer": self.name, "words": list(words)}, indent=0).encode() + b"\n"

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

    def cut(self, text: bytes) -> int:
        """Return the last place between a line and its end: what is before loses no `<eos>`, and what is behind starts with one."""
        at = len(text)
        while (at := text.rfind(b"\n", 0, at)) > 0:
            if text[at - 1] != ord("\n"):
                return at
        return 0

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
