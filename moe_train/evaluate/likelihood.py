"""The likelihood of texts after other texts, token by token, as question-answering tasks ask for it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_train.config import Config, Conflict
from moe_train.engine.model import Model
from moe_train.errors import UserError
from moe_train.parallel.mesh import data_place


class Pair(NamedTuple):
    """Token ids that are given, at least one, and those that are to follow."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """What a model says of a continuation."""

    log_probability: float  # nats
    greedy: bool  # each token of it is the likeliest one


def check_likelihood(config: Config) -> None:
    """Raise UserError with every reason why a token's likelihood under this run's model depends on what follows it."""
    remedy = "train with causal settings; --data evaluates such a model too, and says what leaks"
    found = [Conflict("model", config.model.router.name, leak, remedy) for leak in config.model.leaks()]
    if config.model.capacity_factor is not None:
        rule = "how many of a row's choices an expert takes depends on the row's length, which padding changes"
        remedy = "give model.capacity_factor=null, which drops nothing"
        found.append(Conflict("model.capacity_factor", config.model.capacity_factor, rule, remedy))
    if found:
        raise UserError("\n  ".join(map(str, found)))


def likelihoods(model: Model, pairs: Sequence[Pair], window: int, batch_size: int) -> list[Likelihood]:
    """Of each pair, the same on every rank. Ranks share the pairs, and call this together.

    The model reads the last `window` tokens of a pair without its very last one, which it only predicts: context is lost on the left.
    Raises UserError for a continuation of more than `window` tokens.
    """
    for pair in pairs:
        if len(pair.continuation) > window:
            size = len(pair.continuation)
            raise UserError(
                f"train.seq_len={window}: a continuation has {size} tokens; leave the task out, or use a longer model"
            )
    rank, size = data_place(model.config.parallel, model.world)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for first in range(0, len(batches), size):
        # Ranks compute together; one without a batch of its own repeats the last one and keeps nothing of it.
        batch = batches[min(first + rank, len(batches) - 1)]
        scores = score_batch(model, [pairs[i] for i in batch], window)
        if first + rank < len(batches):
            found[batch] = scores
    found = found.to(model.world.device)
    dist.all_reduce(found)
    found /= model.world.size / size  # ranks that share rows have the same
    return [Likelihood(score, greedy > 0.5) for score, greedy in found.tolist()]


def score_batch(model: Model, pairs: Sequence[Pair], window: int) -> Tensor:
    """Log-probability of each continuation, and 1.0 where it is the greedy one, float64 [pairs, 2]."""
    rows = [[*pair.context, *pair.continuation][-window - 1 :] for pair in pairs]
    lengths = torch.tensor([len(row) - 1 for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max().clamp(min=1)), dtype=torch.long)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids) - 1] = torch.tensor(ids[:-1])
    logits = model.logits(tokens, lengths)
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    for i, (pair, length) in enumerate(zip(pairs, lengths.tolist(), strict=True)):
        targets = torch.tensor(pair.continuation, dtype=torch.long, device=logits.device)
        scores = logits[i, length - len(targets) : length].double().log_softmax(-1)
        found[i, 0] = scores.gather(1, targets[:, None]).sum().cpu()
        found[i, 1] = float((scores.argmax(-1) == targets).all())
    return found
