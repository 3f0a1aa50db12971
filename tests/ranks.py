"""Run a function on several real ranks over gloo and collect what each returns."""

from moe_train.ranks import run_ranks

__all__ = ["run_ranks"]
