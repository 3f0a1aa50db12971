"""How many texts a classifier gets right, class by class.

Shapes: C classes.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_train.data.loader import MicroBatch
from moe_train.engine.model import Model


@torch.no_grad()
def confusion(model: Model, microbatches: Iterable[MicroBatch], num_classes: int) -> tuple[Tensor, float]:
    """How often a text of one class was taken for another, int64 [C, C] (true, predicted), and the sum of losses in nats.

    Over the micro-batches of all ranks, which all call it, with as many each.
    """
    model.train(False)
    counts, device = torch.zeros(num_classes * num_classes + 1, dtype=torch.float64), model.world.device
    for micro in microbatches:
        info = model.batch_info(micro)
        output = model.forward(info, None)
        if output is None or output.logits is None or model.layout.at("tp"):
            continue  # the last layer is on another rank; tensor-parallel ranks all have the same logits
        targets = info.context(micro.targets.to(device))
        logits, targets = output.logits[targets >= 0].double(), targets[targets >= 0]
        pairs = targets * num_classes + logits.argmax(-1)
        counts[:-1] += torch.bincount(pairs, minlength=num_classes * num_classes).cpu()
        counts[-1] += float(F.cross_entropy(logits, targets, reduction="sum"))
    model.reshard()
    counts = counts.to(device)
    dist.all_reduce(counts)
    counts = counts.cpu()
    return counts[:-1].long().view(num_classes, num_classes), float(counts[-1])


def report_classes(counts: Tensor, nats: float, classes: list[str]) -> dict[str, Any]:
    """Mean loss in nats, accuracy, and for each class its texts, how many were recognised, and how often it was predicted."""
    examples = int(counts.sum())
    columns = (counts.sum(1).tolist(), counts.diagonal().tolist(), counts.sum(0).tolist())
    return {
        "loss": nats / max(examples, 1),
        "accuracy": int(counts.trace()) / max(examples, 1),
        "examples": examples,
        "classes": {
            name: {"examples": n, "correct": correct, "predicted": predicted}
            for name, n, correct, predicted in zip(classes, *columns, strict=True)
        },
    }
