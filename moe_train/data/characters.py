"""One id per byte value of a corpus: text8 has 27 of them, enwik8 205."""

import json
from collections.abc import Iterable

import numpy as np

from moe_train.data.tokenizer import Ids, PieceTokenizer, utf8
from moe_train.errors import UserError


class CharacterTokenizer(PieceTokenizer):
    """The byte values `symbols` in rising order, and one more id for the end of a document. Other bytes are refused, not replaced."""

    name = "characters"
    suffix = ".vocab"

    def __init__(self, symbols: Iterable[int]) -> None:
        known = sorted(set(symbols))
        self.eod = len(known)
        self.vocab_size = self.eod + 1
        self._ids = np.full(256, self.vocab_size, dtype=np.uint16)
        self._ids[known] = np.arange(self.eod)
        self._pieces = [*(bytes([symbol]) for symbol in known), b""]
        self.content = json.dumps({"tokenizer": self.name, "symbols": known}).encode() + b"\n"

    @classmethod
    def read(cls, texts: Iterable[bytes]) -> "CharacterTokenizer":
        """The byte values that occur in texts. Raises UserError when there are none."""
        symbols: set[int] = set()
        for text in texts:
            symbols.update(text)
        if not symbols:
            raise UserError("there is no text to read the characters of")
        return cls(symbols)

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of the text's bytes, uint16 [bytes]. Raises UserError for a byte that is not among the symbols."""
        raw = np.frombuffer(utf8(text), dtype=np.uint8)
        ids = self._ids[raw]
        if ids.size and ids.max() == self.vocab_size:
            at = int(ids.argmax())
            raise UserError(
                f"byte {at} of a text is {bytes([raw[at]])!r}, which is not among the {self.eod} characters of the tokenizer; "
                "read the characters from a corpus that has it, or take the tokenizer bytes"
            )
        return ids

    def cut(self, text: bytes) -> int:
        """Return the end: each byte is a token."""
        return len(text)

    @classmethod
    def from_json(cls, fields: object, source: str) -> "CharacterTokenizer":
        """Make a tokenizer of the list in a file that `save` wrote; `source` names it in errors."""
        if not isinstance(fields, list) or not fields or not all(type(s) is int and 0 <= s < 256 for s in fields):
            raise UserError(f"tokenizer file {source}: symbols must be a list of byte values; read them from the corpus again")
        return cls(fields)
