"""Our tokenizers as transformers' tokenizer files, and back.

Both become a `tokenizer.json` whose ids are ours for every text, special tokens in the text included (`split_special_tokens`), but for
one character: U+2581 is how SentencePiece writes a space, and a tokenizer.json made from SentencePiece reads it as one.
"""

import json
from pathlib import Path
from typing import Any

from moe_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from moe_train.errors import UserError

END = "<|endoftext|>"  # of the byte tokenizer's documents
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
SPACE = "\u2581"
IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # the parts of a tokenizer.json that decide the ids


def write_tokenizer(tokenizer: Tokenizer, folder: Path, text: str) -> None:
    """Write the files that transformers loads a tokenizer from. Raises RuntimeError where it would give other ids for `text`."""
    from transformers import PreTrainedTokenizerFast

    backend, end = _fast(tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, split_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if fast(text)["input_ids"] != tokenizer.encode(text).tolist() or fast.eos_token_id != tokenizer.eod:
        raise RuntimeError(f"the {tokenizer.name} tokenizer and its tokenizer.json give other ids; this is a bug")
    fast.save_pretrained(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder / MODEL_FILE)


def read_tokenizer(folder: Path, named: str | None) -> Tokenizer:
    """The tokenizer `named` (`bytes` or a file), or the one in `folder`. Raises UserError where none there can be read."""
    if named is not None:
        return load_tokenizer(named)
    if (folder / MODEL_FILE).is_file():
        return load_tokenizer(folder / MODEL_FILE)
    written = folder / JSON_FILE
    if written.is_file():
        there, ours = (json.loads(text) for text in (written.read_text(encoding="utf-8"), _from_bytes()[0].to_str()))
        if all(there.get(part) == ours[part] for part in IDS):
            return ByteTokenizer()
    there = JSON_FILE if written.is_file() else f"no {MODEL_FILE} and no {JSON_FILE}"
    raise UserError(
        f"{folder}: has {there}, from which no tokenizer of this project can be made; "
        "give --tokenizer bytes or --tokenizer FILE (a SentencePiece model), whose ids are the model's"
    )


def _fast(tokenizer: Tokenizer) -> tuple[Any, str]:
    """The tokenizer as one of the tokenizers package, and the text of its end of a document."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        return _from_bytes()
    raise UserError(f"tokenizer {tokenizer.name}: has no form that transformers reads; export a model of another tokenizer")


def _from_bytes() -> tuple[Any, str]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    # The printable stand-ins of byte-level models (GPT-2's): a character for each byte, and no merges.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return fast, END


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[Any, str]:
    """Byte-pair merges are those of the pieces, best score first; SentencePiece joins the pair whose piece has the best score."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast

    pieces, scores, unknown = tokenizer.pieces()
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    fast = Fast(models.BPE(vocab=ids, merges=pairs, unk_token=pieces[unknown], byte_fallback=True, fuse_unk=False))
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(pieces[tokenizer.eod], special=True, normalized=False)])
    return fast, pieces[tokenizer.eod]
