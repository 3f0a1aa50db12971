"""Hugging Face's tokenizer.json, read by the library `tokenizers` (the extra [data])."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_train.data.tokenizer import PROBE, Ids, Tokenizer, utf8
from moe_train.errors import UserError
from moe_train.files import write_atomically

# How models in use call the end of a document; the first one that the file has as a special token is taken.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class PretrainedTokenizer(Tokenizer):
    """A tokenizer.json whose pieces are bytes (GPT-2, Llama 3, Qwen, OLMoE) or fall back to them (Gemma).

    Special tokens that a text spells out are encoded as text. What a file says about truncation, padding and templates is left
    aside: a document is its ids and one end. Normalisation to NFC, which Qwen has, is the only change of text that is let through.

    Raises UserError when the file is damaged, changes text otherwise, or has no end of a document.
    """

    name = "tokenizer.json"
    suffix = ".tokenizer"

    def __init__(self, content: bytes, source: str = "(memory)") -> None:
        self._content = content
        fields = self._load(source)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > 2 * len(ids):
            raise UserError(f"tokenizer file {source} has {len(ids)} pieces but ids up to {self.vocab_size - 1}; it is damaged")
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        ends = [end for end in ENDS if end in special]
        if not ends:
            raise UserError(f"tokenizer file {source} has no special token to end documents (one of {', '.join(ENDS)})")
        self.eod = ids[ends[0]]
        to_bytes = _spelling(fields.get("decoder"), source)
        self._pieces = [b""] * self.vocab_size
        for piece, i in ids.items():
            self._pieces[i] = utf8(piece) if i in added else to_bytes(piece)
        for i, token in added.items():
            if token.special:
                self._pieces[i] = b""
        if len({piece for piece in self._pieces if len(piece) == 1}) < 256:
            raise UserError(f"tokenizer file {source} has no piece for some bytes, so that it cannot carry every text")
        if self.decode(self.encode(PROBE)) != PROBE or len(self.encode("")):
            raise UserError(
                f"tokenizer file {source} changes text (a normalizer, a space before the first word, or lower case)"
            )

    def _load(self, source: str) -> dict[str, Any]:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise UserError(f"tokenizer file {source} needs the package tokenizers: pip install 'moe_train[data]'") from None
        try:
            fields = json.loads(self._content)
            self._tokenizer = Fast.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer file {source} is no tokenizer.json, or is damaged ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        return dict(fields)

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of a text, int32 [tokens]. Raises UserError for bytes that are no valid UTF-8, which it cannot carry."""
        try:
            valid = utf8(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"byte {error.start} of a text is no valid UTF-8, which a tokenizer.json cannot carry; "
                "prepare with --invalid-utf8 replace"
            ) from None
        return np.array(self._tokenizer.encode(valid, add_special_tokens=False).ids, dtype=np.int32)

    def decode_bytes(self, ids: Iterable[int] | Ids) -> bytes:
        """Return the pieces' bytes, one after the other."""
        return b"".join([self._pieces[i] for i in self._checked(ids).tolist()])

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each piece, [vocab_size]."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the file."""
        return "sha256-" + hashlib.sha256(self._content).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file as it was read."""
        write_atomically(path, self._content)


def _spelling(decoder: Any, source: str) -> Any:
    """Return what turns a piece of the vocabulary into bytes, by the file's decoder."""
    decoder = decoder if isinstance(decoder, dict) else {}
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type") for part in parts if isinstance(part, dict)} if isinstance(parts, list) else set()
    if "ByteLevel" in kinds:
        return _from_stand_ins
    if "ByteFallback" in kinds:
        return _from_fallback
    raise UserError(
        f"tokenizer file {source} has the decoder {decoder.get('type')}; only pieces of bytes (ByteLevel) and byte fallback "
        "(ByteFallback) lose nothing of a text"
    )


def _stand_ins() -> dict[str, int]:
    """GPT-2's printable character for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


_STAND_INS = _stand_ins()


def _from_stand_ins(piece: str) -> bytes:
    return bytes(_STAND_INS[c] for c in piece) if all(c in _STAND_INS for c in piece) else utf8(piece)


def _from_fallback(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else utf8(piece.replace("\u2581", " "))
