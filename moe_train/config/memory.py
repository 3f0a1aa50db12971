"""Rules of segment-level recurrence: where rows can see hidden rows of the rows before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.config.base import Conflict

if TYPE_CHECKING:
    from moe_train.config.run import Config


def memory_conflicts(config: Config, without: str) -> list[Conflict]:
    """Why rows of this run's model cannot see hidden rows of earlier rows; `without` says how to do without."""
    model, found = config.model, []
    if model.block != "transformer_xl":
        rule = "only blocks of transformer_xl see hidden rows of earlier columns"
        found.append(Conflict("model.block", model.block, rule, without))
    elif model.transformer_xl.attn_type == "absolute":
        rule = "positions that are added to embeddings do not go on from row to row"
        found.append(Conflict("model.transformer_xl.attn_type", "absolute", rule, without))
    if not config.data.mask_documents:
        rule = "with memory a row sees back to the start of its document"
        found.append(Conflict("data.mask_documents", False, rule, f"set it to true, or {without}"))
    return found


def training_conflicts(config: Config) -> list[Conflict]:
    """Why this run cannot train with its `train.memory`."""
    if not config.train.memory:
        return []
    without, data = "set train.memory=0", config.data
    found = memory_conflicts(config, without)
    if data.order != "contiguous":
        rule = "with train.memory each row must go on where the row of the step before has ended"
        found.append(Conflict("data.order", data.order, rule, f"use contiguous, or {without}"))
    if config.sft.train is not None:
        rule = "fine-tuning has examples in its rows, which do not go on in other rows"
        found.append(Conflict("train.memory", config.train.memory, rule, "set it to 0"))
    if data.weights is not None:
        rule = "rows of a blend cannot go on where the row of the step before has ended, as train.memory needs"
        found.append(Conflict("data.weights", data.weights, rule, f"leave it out, or {without}"))
    return found
