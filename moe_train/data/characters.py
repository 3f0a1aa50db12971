"""One id per byte value of a corpus: text8 has 27 of them, enwik8 205."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moe_train.data.tokenizer import Ids, Tokenizer, utf8
from moe_train.errors import UserError
from moe_train.files import write_atomically


class CharacterTokenizer(Tokenizer):
    """The byte values `symbols` in rising order, and one more id for the end of a document. Other bytes are refused, not replaced."""

    name = "characters"
    suffix = ".vocab"

    def __init__(self, symbols: Iterable[int]) -> None:
        self._symbols = np.array(sorted(set(symbols)), dtype=np.uint8)
        self.eod = len(self._symbols)
        self.vocab_size = self.eod + 1
        self._ids = np.full(256, self.vocab_size, dtype=np.uint16)
        self._ids[self._symbols] = np.arange(self.eod)

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

    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the bytes of the ids, without ends of documents."""
        array = self._checked(ids)
        return self._symbols[array[array != self.eod]].tobytes()

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return 1 for each symbol and 0 for the end of a document, [vocab_size]."""
        return (np.arange(self.vocab_size) != self.eod).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the file that `save` writes."""
        return "sha256-" + hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return json.dumps({"tokenizer": self.name, "symbols": self._symbols.tolist()}).encode() + b"\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that lists the symbols."""
        write_atomically(path, self._content())

    @classmethod
    def from_json(cls, fields: object, source: str) -> "CharacterTokenizer":
        """Make a tokenizer of the list in a file that `save` wrote; `source` names it in errors."""
        if not isinstance(fields, list) or not fields or not all(type(s) is int and 0 <= s < 256 for s in fields):
            raise UserError(f"tokenizer file {source}: symbols must be a list of byte values; read them from the corpus again")
        return cls(fields)
