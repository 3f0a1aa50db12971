"""Our tokenizers as transformers' tokenizer files, and back.

All become a `tokenizer.json` whose ids are ours for every text, special tokens in the text included (`split_special_tokens`), but for
one character: U+2581 is how SentencePiece writes a space, and a tokenizer.json made from SentencePiece reads it as one. A
tokenizer.json that came from elsewhere goes back as it is, without what would add ids to a text's own (templates, padding).
"""

import json
from pathlib import Path
from typing import Any

from moe_train.data.pretrained import STAND_INS, PretrainedTokenizer
from moe_train.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from moe_train.errors import UserError

END = "<|endoftext|>"  # of the byte tokenizer's documents
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
SPACE = "\u2581"
IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # the parts of a tokenizer.json that decide the ids


def write_tokenizer(tokenizer: Tokenizer, folder: Path, text: str, config: Any = None) -> None:
    """Write the files that transformers loads a tokenizer from. Raises RuntimeError where it would give other ids for `text`.

    `config`: the model's, where transformers knows none of that type.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend, end = _fast(tokenizer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, split_special_tokens=True, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    if isinstance(tokenizer, PretrainedTokenizer):  # the same file, and not as the library writes it, so that its hash stays
        tokenizer.save(folder / JSON_FILE)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder / MODEL_FILE)
    written = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if written(text)["input_ids"] != tokenizer.encode(text).tolist() or written.eos_token_id != tokenizer.eod:
        raise RuntimeError(f"the {tokenizer.name} tokenizer and its tokenizer.json give other ids; this is a bug")


def read_tokenizer(folder: Path, named: str | None) -> Tokenizer:
    """The tokenizer `named` (`bytes` or a file), or the one in `folder`: its tokenizer.model, else its tokenizer.json.

    Raises UserError where there is none, or it cannot be read.
    """
    if named is not None:
        return load_tokenizer(named)
    found = [folder / name for name in (MODEL_FILE, JSON_FILE) if (folder / name).is_file()]
    remedy = "give --tokenizer bytes or --tokenizer FILE (a SentencePiece model or a tokenizer.json), whose ids are the model's"
    if not found:
        raise UserError(f"{folder}: has no {MODEL_FILE} and no {JSON_FILE}; {remedy}")
    try:
        return ByteTokenizer() if found[0].name == JSON_FILE and _is_bytes(found[0]) else load_tokenizer(found[0])
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None


def _is_bytes(file: Path) -> bool:
    """Whether a tokenizer.json is the one that is written for bytes."""
    try:
        there = json.loads(file.read_bytes())
        ours = json.loads(_from_bytes()[0].to_str())
        return all(there.get(part) == ours[part] for part in IDS)
    except (OSError, ValueError, RecursionError, AttributeError):
        return False  # load_tokenizer says what is wrong with it


def _fast(tokenizer: Tokenizer) -> tuple[Any, str]:
    """The tokenizer as one of the tokenizers package, and the text of its end of a document."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        return _from_bytes()
    if isinstance(tokenizer, PretrainedTokenizer):
        from tokenizers import Tokenizer as Fast

        return Fast.from_str(tokenizer.content.decode("utf-8")), tokenizer.end
    raise UserError(f"tokenizer {tokenizer.name}: has no form that transformers reads; export a model of another tokenizer")


def _from_bytes() -> tuple[Any, str]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE(vocab=STAND_INS, merges=[]))
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
    prepend = [normalizers.Prepend(SPACE)] * tokenizer.prefix
    fast.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", left=1)] * tokenizer.prefix
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    fast.add_special_tokens([AddedToken(pieces[tokenizer.eod], special=True, normalized=False)])
    return fast, pieces[tokenizer.eod]
