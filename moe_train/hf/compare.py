"""Whether two models say the same about real tokens."""

import argparse
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from moe_train.data.characters import CharacterTokenizer
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.hf import remote

TOLERANCE = 1e-5  # of a logit, relative to the largest one: fp32 products in another order
ROWS, LENGTH = 2, 96
CHARACTERS = 20_000


class Difference(NamedTuple):
    """Of the logits of two models."""

    largest: float
    scale: float  # the largest logit
    tokens: int

    def within(self, tolerance: float = TOLERANCE) -> bool:
        """Whether it is at most that share of the largest logit (no NaN is)."""
        return self.largest <= tolerance * self.scale

    def __str__(self) -> str:
        return f"largest difference of logits {self.largest:.2e}, of {self.scale:.3g}, on {self.tokens} tokens of real text"


def real_text() -> str:
    """Of Python's standard library."""
    return inspect.getsource(argparse)[:CHARACTERS]


def real_tokens(tokenizer: Tokenizer, vocab_size: int, seq_len: int) -> Tensor:
    """Text of Python's standard library, [2, at most 96] int64."""
    length = min(LENGTH, seq_len)
    text = real_text().encode()
    if isinstance(tokenizer, CharacterTokenizer):
        known = tokenizer.decode_bytes(range(tokenizer.eod))
        text = bytes(byte for byte in text if byte in known)
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))
    if int(ids.max()) >= vocab_size:
        raise UserError(
            f"the tokenizer has id {int(ids.max())}, and the model's vocab_size is {vocab_size}; give the model's own"
        )
    return ids[: ROWS * length].view(ROWS, -1)


@torch.no_grad()
def their_logits(folder: Path, settings: dict[str, Any], tokens: Tensor) -> Tensor:
    """tokens [B, S] -> logits [B, S, V] of the model in `folder`, as transformers computes them in fp32. Runs no code from there."""
    import transformers

    ours = settings["model_type"] == "moe_train"
    kind: Any = remote.make_class(settings["model"]["router"]["name"]) if ours else transformers.AutoModelForCausalLM
    options = {} if ours else {"trust_remote_code": False}
    with _files_are_read():
        model = kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    logits: Tensor = model.eval()(input_ids=tokens).logits
    return logits


@contextmanager
def _files_are_read() -> Iterator[None]:
    """Within, transformers reads each tensor when its turn comes, as it does on Windows, instead of mapping the files.

    The pages of a mapped file stay beside the weights that are stacked from them, so that a model would be resident twice.
    """
    from transformers import modeling_utils

    opened = modeling_utils.safe_open

    def read(file: str, **options: Any) -> Any:
        return opened(file, **(options | {"backend": "pread"}))

    with patch.object(modeling_utils, "safe_open", read), patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
        yield


def compare(ours: Tensor, theirs: Tensor) -> Difference:
    """Of logits [B, S, V]."""
    largest = float((ours.double() - theirs.double()).abs().max())
    return Difference(largest, float(ours.abs().max()), ours.shape[0] * ours.shape[1])


def require_same(difference: Difference, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise UserError unless the two models say the same."""
    if not difference.within(tolerance):
        rule = f"which is more than {tolerance:g} of it; nothing was written"
        raise UserError(f"{what}: {difference}, {rule} (many layers add up rounding: --tolerance allows more)")
