"""Trained models: opened from their checkpoints, and measured (docs/evaluation.md)."""

from moe_train.evaluate.figures import byte_lengths, report
from moe_train.evaluate.memory import check_memory
from moe_train.evaluate.opening import CONFIG_FILE, PLAIN, TOKENIZER_FILE, Restored, require_language_model, restore

__all__ = [
    "CONFIG_FILE",
    "PLAIN",
    "TOKENIZER_FILE",
    "Restored",
    "byte_lengths",
    "check_memory",
    "report",
    "require_language_model",
    "restore",
]
