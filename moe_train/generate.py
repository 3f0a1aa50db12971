"""Sample text from a decoder. Each token comes from a full forward over the last `window` tokens."""

import torch
from torch import Tensor

from moe_train.data.tokenizer import Tokenizer
from moe_train.model.decoder import Decoder
from moe_train.model.routing import BatchInfo


@torch.no_grad()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    window: int,
    device: torch.device,
) -> str:
    """The text that `model` writes after `prompt` (not included), until it ends the document or `max_tokens` are written.

    The same arguments give the same text: random numbers come from a generator of `seed` alone. Ranks of a sharded model must call
    this together. An empty prompt starts from the end of a document, as training texts do.
    """
    model.eval()
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eod]
    start = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        logits = model(_batch(ids[-window:], device)).logits[0, -1, : tokenizer.vocab_size]
        chosen = _choose(logits.double().cpu(), temperature, generator)
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[start:])


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def _batch(ids: list[int], device: torch.device) -> BatchInfo:
    tokens = torch.tensor([ids], device=device)
    zeros = torch.zeros_like(tokens)
    positions = torch.arange(len(ids), device=device)[None]
    return BatchInfo(tokens, positions, zeros, zeros, zeros[:, 0], None)
