"""Write text with a decoder: the prompts are read at once, then each forward pass adds one token to each row.

A row sees the last `window` tokens of its text. While all of it fits, what the model knows of it is kept in a cache, and a token costs
the forward pass of one token. Beyond that the window moves with every token and with it every position in it, so that each token costs
a forward pass over the whole window, as it does everywhere for a model that cannot use a cache (`cache_conflicts`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_train.config import Config, Conflict
from moe_train.data.stream import TokenStream
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import UserError
from moe_train.model.cache import Cache


class Sampling(NamedTuple):
    """How the next token is chosen, and when a text ends."""

    max_tokens: int
    temperature: float = 0.8  # 0 = the likeliest token
    top_k: int = 0  # choose among so many of the likeliest tokens; 0 = among all
    top_p: float = 1.0  # choose among the fewest likeliest tokens that together have this probability (arXiv 1904.09751)
    stop: tuple[str, ...] = ()  # a text ends before the first of these


class Prompt(NamedTuple):
    """What a text continues, and the seed of its own random numbers."""

    text: str
    seed: int = 0
    last: int | None = None  # only so many of its last tokens are read


class Written(NamedTuple):
    """The text that follows a prompt."""

    text: str
    tokens: int  # sampled, those of a stop text and an end of document included
    reason: str  # why it ends: `end` of the document, `stop` text, or `length`


class Predict(Protocol):
    """What comes next in some rows of token ids."""

    def __call__(self, rows: list[list[int]], cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """Logits [B, V] after each row, and a cache that holds the rows, if there is one. `cache` holds all but their last ids."""
        ...


def with_cache(decode: Callable[[Tensor, Cache], tuple[Tensor, Cache]], device: torch.device, label: int = 0) -> Predict:
    """Predict one token after the other, of documents with a label.

    `decode`: tokens [B, S] that follow a cache -> logits [B, V] and the cache with them.
    """

    def predict(rows: list[list[int]], cache: Cache | None) -> tuple[Tensor, Cache | None]:
        if cache is not None:
            return decode(torch.tensor([row[-1:] for row in rows], device=device), cache)
        longest = max(map(len, rows))
        padding = torch.tensor([longest - len(row) for row in rows], device=device)
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        return decode(tokens, Cache(padding, label=label))

    return predict


def without_cache(logits_of: Callable[[Tensor], Tensor], device: torch.device) -> Predict:
    """Predict by a forward pass over each whole row. `logits_of`: tokens [1, S] -> logits [1, S, V]."""

    def predict(rows: list[list[int]], cache: Cache | None) -> tuple[Tensor, Cache | None]:
        return torch.stack([logits_of(torch.tensor([row], device=device))[0, -1] for row in rows]), None

    return predict


def label_number(config: Config, label: str) -> int:
    """The number of a label of documents, which is given as such or by its name in the run's training data.

    Raises UserError where the router does not read labels, or there is no such label.
    """
    router = config.model.router
    if not router.reads_labels:
        raise UserError(f"--label={label}: router {router.name} does not read the labels of documents; leave it out")
    if label.isdecimal() and len(label) < 10:
        return int(label)
    names = () if config.data.train is None else TokenStream(config.data.train).label_names
    if label not in names:
        raise UserError(
            f"--label={label}: no label of data.train, which has {', '.join(names)}; give one of them, or its number"
        )
    return names.index(label)


def cache_conflicts(config: Config) -> list[Conflict]:
    """Why this run's model cannot decode from a cache; nothing if it can."""
    model, parallel = config.model, config.parallel
    found = []
    if leaks := model.router.leaks():
        rule = f"{'; '.join(leaks)}; no token can be decoded before the ones after it are known"
        found.append(Conflict("model.router.name", model.router.name, rule, "train with causal=true, or use --no-cache"))
    if model.capacity_factor is not None:
        rule = "how many of a row's choices an expert takes depends on the row's length, which grows with every token"
        remedy = "give model.capacity_factor=null, which drops nothing, or use --no-cache"
        found.append(Conflict("model.capacity_factor", model.capacity_factor, rule, remedy))
    axes = {"pp": parallel.pp, "tp": parallel.tp, "cp": parallel.cp}
    rule = "decoding from a cache needs whole rows and all layers on each rank"
    return found + [Conflict(f"parallel.{axis}", n, rule, "use 1, or --no-cache") for axis, n in axes.items() if n > 1]


def check_cache(config: Config) -> None:
    """Raise UserError with every reason why this run's model cannot decode from a cache."""
    if found := cache_conflicts(config):
        raise UserError("\n  ".join(map(str, found)))


@torch.no_grad()
def generate(
    predict: Predict, tokenizer: Tokenizer, prompts: Sequence[Prompt], sampling: Sampling, window: int
) -> list[Written]:
    """The texts that a model writes after the prompts (which are not included), all in one batch.

    A text depends on its prompt, its seed and `sampling` alone, up to the rounding of the logits, and not on the other rows. Ranks
    of a sharded model must call this together. An empty prompt starts from the end of a document, as training texts do.
    """
    rows = [_Row(tokenizer, prompt, sampling) for prompt in prompts]
    writing = [row for row in rows if not row.reason]
    cache: Cache | None = None
    while writing:
        logits, cache = predict([row.ids[-window:] for row in writing], cache)
        for row, scores in zip(writing, logits[:, : tokenizer.vocab_size].double().cpu(), strict=True):
            row.add(choose(scores, sampling, row.generator))
        going = [i for i, row in enumerate(writing) if not row.reason]
        if cache is not None and len(going) < len(writing):
            cache = cache.take(going)
        writing = [writing[i] for i in going]
        if any(len(row.ids) > window for row in writing):  # every position in the window moves
            cache = None
    return [Written(row.text.decode("utf-8", errors="replace"), row.count, row.reason) for row in rows]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from logits [V]: the likeliest, or a sample from the softmax over those that top_k and then top_p leave."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = (logits / sampling.temperature).softmax(0)
    likely = probs.sort(descending=True, stable=True)
    if sampling.top_k:
        probs[likely.indices[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        share = likely.values[: sampling.top_k or None]
        before = (share.cumsum(0) - share) / share.sum()
        probs[likely.indices[: len(share)][before >= sampling.top_p]] = 0
    return int(torch.multinomial(probs, 1, generator=generator))


class _Row:
    """A text that is being written."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self.ids = [int(i) for i in tokenizer.encode(prompt.text)][-(prompt.last or 0) :] or [tokenizer.eod]
        self.generator = torch.Generator().manual_seed(prompt.seed)
        self.text, self.count = b"", 0
        self.stops = [stop.encode(errors="surrogateescape") for stop in sampling.stop]
        self.reason = "" if sampling.max_tokens else "length"

    def add(self, token: int) -> None:
        """Go on by a token, which may end the text."""
        self.ids.append(token)
        self.count += 1
        if token == self.tokenizer.eod:
            self.reason = "end"
            return
        old = len(self.text)
        self.text += self.tokenizer.decode_bytes([token])
        found = [self.text.find(stop, max(old - len(stop) + 1, 0)) for stop in self.stops]
        if any(at >= 0 for at in found):
            self.reason, self.text = "stop", self.text[: min(at for at in found if at >= 0)]
        elif self.count == self.sampling.max_tokens:
            self.reason = "length"
