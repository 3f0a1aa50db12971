"""The section of supervised fine-tuning, and the rules between it and the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from moe_train.config.base import Conflict, PathText, Section

if TYPE_CHECKING:
    from moe_train.config.run import Config


class SftSection(Section):
    """Supervised fine-tuning with launch/sft.py (docs/fine_tuning.md). It reads no corpora: of `data` only the tokenizer counts."""

    task: Literal["instructions", "classification"] = "instructions"
    """instructions = the responses to instructions or in chats; classification = a class for each text, by a new head"""
    train: PathText | list[PathText] | None = None
    """files of examples: .json or .jsonl; for classification also .tsv, .csv, trees in .txt, or a folder with one for each class"""
    valid: PathText | list[PathText] | None = None
    """held-out examples, evaluated every eval.every steps and at the end; null = none"""
    test: PathText | list[PathText] | None = None
    """examples evaluated once at the end; null = none"""
    epochs: PositiveInt | None = None
    """how often each example is trained on: decides the number of steps in place of train.steps; null = train.steps does"""
    pack: bool = True
    """several examples share a row; false = one example for each row"""
    too_long: Literal["truncate", "skip", "error"] = "truncate"
    """what happens to an example of more than train.seq_len tokens; how many there were is said"""
    empty_response: Literal["error", "skip", "keep"] = "error"
    """what happens to an empty response; keep = the end of the document is learned as the answer"""
    classes: list[str] | None = None
    """names of the classes in the head's order; default: those of sft.train, sorted"""


def sft_conflicts(config: Config) -> list[Conflict]:
    """Rules between `sft` and the other sections."""
    sft, model, found = config.sft, config.model, []
    classifies = sft.task == "classification"
    if model.num_classes is not None and not classifies:
        rule = "only sft.task=classification trains a head of classes"
        found.append(Conflict("model.num_classes", model.num_classes, rule, "leave it out, or set sft.task"))
    if sft.classes is not None and len(set(sft.classes)) < max(len(sft.classes), 2):
        rule = "must be at least two names, each once"
        found.append(Conflict("sft.classes", sft.classes, rule, "name each class once, or leave it out"))
    if sft.train is not None and not config.data.mask_documents:
        rule = "examples that share a row must not see each other"
        found.append(Conflict("data.mask_documents", False, rule, "set it to true"))
    if sft.train is not None and config.train.memory:
        rule = "an example continues none of the step before"
        found.append(Conflict("train.memory", config.train.memory, rule, "set it to 0"))
    if classifies and config.sample.max_tokens:
        rule = "a classifier writes no text"
        found.append(Conflict("sample.max_tokens", config.sample.max_tokens, rule, "set it to 0"))
    return found
