"""Sample text from a decoder. Each token comes from a full forward over the last `window` tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_train.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    window: int,
    device: torch.device,
) -> str:
    """The text that a model writes after `prompt` (not included), until it ends the document or `max_tokens` are written.

    `logits_of` maps tokens [1, S] to logits [1, S, V].

    The same arguments give the same text: random numbers come from a generator of `seed` alone. Ranks of a sharded model must call
    this together. An empty prompt starts from the end of a document, as training texts do.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eod]
    start = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        logits = logits_of(torch.tensor([ids[-window:]], device=device))[0, -1, : tokenizer.vocab_size]
        chosen = _choose(logits.double().cpu(), temperature, generator)
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[start:])


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
