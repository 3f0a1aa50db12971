"""Tokenizers as Qwen, OLMoE, Llama and Mixtral ship them, trained here on a little text: into a checkpoint and back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moe_train.data.tokenizer import load_tokenizer
from moe_train.errors import UserError
from moe_train.hf.compare import real_text
from moe_train.hf.exporting import to_hf
from moe_train.hf.importing import from_hf
from moe_train.hf.native import open_native

pytestmark = pytest.mark.integration

TEXTS = [
    "",
    "def f(x):\n    return  x\t# é 中文 \U0001f9ff\r\n",
    "  two spaces before",
    "Hello, world! 1234 it's",
    "a" * 300,
    real_text()[:3000],
]
SPELLED = "\0 <|endoftext|> </s> <s> <unk> <0x41> <think>   <|im_start|> [INST]"
# The pattern that Qwen2 and Qwen3 split text by.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(split: Any, added: list[AddedToken]) -> Fast:
    """Byte-level pieces; added tokens come after them, as in files that were made from GPT-2's."""
    fast = Fast(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = split
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([real_text()], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    fast.add_tokens(added)
    return fast


def qwen() -> Fast:
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    plain = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    return byte_level(pre_tokenizers.Sequence([split, pieces]), special + plain)


def olmoe() -> Fast:
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|padding|>", "<|endoftext|>")]
    spaces = [AddedToken(" " * n, special=False, normalized=True) for n in range(24, 1, -1)]
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), spaces + special)


def mixtral(later: bool = False) -> Fast:
    """Pieces of text with bytes to fall back to, a space before the text, and a start that a template adds."""
    trained = Fast(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    trained.train_from_iterator([real_text()], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    fast = Fast(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if later:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    fast.post_processor = processors.TemplateProcessing("<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return fast


FAMILIES: dict[str, tuple[str, Callable[[], Fast], str]] = {
    "qwen": ("qwen3_moe", qwen, "<|endoftext|>"),
    "olmoe": ("olmoe", olmoe, "<|endoftext|>"),
    "mixtral": ("mixtral", mixtral, "</s>"),
    "mixtral-metaspace": ("mixtral", lambda: mixtral(later=True), "</s>"),
}


def write_model(folder: Path, kind: str, vocab_size: int) -> None:
    """A tiny model of transformers."""
    settings = {
        "vocab_size": vocab_size + 7,  # as theirs, which are rounded up
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 64,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_comes_with_its_model_and_goes_back(family: str, tmp_path: Path) -> None:
    kind, make, end = FAMILIES[family]
    fast = make()
    there, back, again = tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"
    write_model(there, kind, fast.get_vocab_size())
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=end).save_pretrained(there)
    assert from_hf(there, back).within()
    native = open_native(back)
    ours, theirs = native.tokenizer, AutoTokenizer.from_pretrained(there)
    assert ours.eod == theirs.eos_token_id
    assert ours.vocab_size == len(theirs) == native.config.model.vocab_size - 7
    to_hf(back, again)
    written = AutoTokenizer.from_pretrained(again)
    assert written.eos_token_id == ours.eod
    for text in (*TEXTS, SPELLED):
        ids = ours.encode(text).tolist()
        assert written(text)["input_ids"] == ids
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if text is not SPELLED:
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert written.decode(ids) == theirs.decode(ids)
    from_hf(again, tmp_path / "back")
    assert open_native(tmp_path / "back").tokenizer.fingerprint == ours.fingerprint


def test_a_tokenizer_model_with_a_space_before_the_text(tmp_path: Path) -> None:
    """As Llama 2 and Mixtral ship it beside the tokenizer.json; its ids are those of SentencePiece and of AutoTokenizer."""
    there, back, again = tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"
    there.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(real_text().splitlines()),
        model_prefix=str(there / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (there / "tokenizer.vocab").unlink()
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(there / "tokenizer.model"))
    write_model(there, "mixtral", theirs.get_piece_size())
    assert from_hf(there, back).within()
    ours = open_native(back).tokenizer
    to_hf(back, again)
    written = AutoTokenizer.from_pretrained(again)
    for text in (*TEXTS, SPELLED):
        ids = theirs.encode(text)
        assert ours.encode(text).tolist() == ids
        assert written(text)["input_ids"] == ids
        assert written.decode(ids) == text
    assert written.eos_token_id == ours.eod == theirs.eos_id()
    from_hf(again, tmp_path / "back")
    assert open_native(tmp_path / "back").tokenizer.fingerprint == ours.fingerprint


def test_files_that_cannot_be_read_name_the_remedy(tmp_path: Path) -> None:
    write_model(tmp_path / "theirs", "mixtral", 300)
    file = tmp_path / "theirs" / "tokenizer.json"
    for content in ("[" * 10_000, "{}", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "\ufeff"):
        file.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json.*; give --tokenizer bytes or --tokenizer FILE"):
            from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    qwen().save(str(file))
    with pytest.raises(UserError, match="and the model's vocab_size is 307"):
        from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert load_tokenizer(file).eod == 500
