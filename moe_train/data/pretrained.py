"""Hugging Face's tokenizer.json, read by the library `tokenizers` (the extra [data])."""

import json
import re
from typing import Any

import numpy as np

from moe_train.data.tokenizer import PROBE, Ids, PieceTokenizer, utf8
from moe_train.errors import UserError

# How models in use call the end of a document; the first one that the file has as a special token is taken.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]")

# Parts of a file that add ids to a text's own, and are left aside.
ASIDE = ("truncation", "padding", "post_processor")

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class PretrainedTokenizer(PieceTokenizer):
    """A tokenizer.json whose pieces are bytes (GPT-2, Llama 3, Qwen, OLMoE) or fall back to them (Gemma, Llama 2, Mixtral).

    Special tokens that a text spells out are encoded as text. What a file says about truncation, padding and templates is left
    aside: a document is its ids and one end. Two changes of text are let through: normalisation to NFC, which Qwen and OLMoE have,
    and a space before the text, which Llama 2 and Mixtral put there; it comes back with the text and counts as a byte.

    Raises UserError when the file is damaged, changes text otherwise, or has no end of a document.
    """

    name = "tokenizer.json"
    suffix = ".tokenizer"

    def __init__(self, content: bytes, source: str = "(memory)") -> None:
        fields = self._load(content, source)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > 2 * len(ids):
            raise UserError(f"tokenizer file {source} has {len(ids)} pieces but ids up to {self.vocab_size - 1}; it is damaged")
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        ends = [end for end in ENDS if end in special]
        if not ends:
            raise UserError(f"tokenizer file {source} has no special token to end documents (one of {', '.join(ENDS)})")
        self.end = ends[0]
        self.eod = ids[self.end]
        to_bytes = _spelling(fields.get("decoder"), source)
        self._pieces = [b""] * self.vocab_size
        for piece, i in ids.items():
            self._pieces[i] = utf8(piece) if i in added else to_bytes(piece)
        for i, token in added.items():
            if token.special:
                self._pieces[i] = b""
        if len({piece for piece in self._pieces if len(piece) == 1}) < 256:
            raise UserError(f"tokenizer file {source} has no piece for some bytes, so that it cannot carry every text")
        if not all(self._keeps(text) for text in (PROBE, PROBE.strip())) or len(self.encode("")):
            raise UserError(f"tokenizer file {source} changes text (a normalizer, or lower case)")

    def _keeps(self, text: str) -> bool:
        """Whether a text comes back, at most with a space before it."""
        return self.decode(self.encode(text)) in (text, " " + text)

    def _load(self, content: bytes, source: str) -> dict[str, Any]:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise UserError(f"tokenizer file {source} needs the package tokenizers: pip install 'moe_train[data]'") from None
        try:
            fields: dict[str, Any] = {**json.loads(content), **dict.fromkeys(ASIDE)}
            text = json.dumps(fields, ensure_ascii=False)
            self._tokenizer, self.content = Fast.from_str(text), text.encode("utf-8")
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer file {source} is no tokenizer.json, or is damaged ({error})") from None
        self._tokenizer.encode_special_tokens = True
        return fields

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


STAND_INS = _stand_ins()


def _from_stand_ins(piece: str) -> bytes:
    return bytes(STAND_INS[c] for c in piece) if all(c in STAND_INS for c in piece) else utf8(piece)


def _from_fallback(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else utf8(piece.replace("\u2581", " "))
