"""launch/pretrain.py with a fault in it: `inject.py FAULTS CONFIG.yaml [section.key=value ...]`, FAULTS as JSON.

nan     [step, rank, times]      this rank's gradients are NaN at that step, before they are reduced, so many times
poison  step                     every rank's rows are random tokens at that step
late    [step, rank, seconds]    this rank sleeps before that step
slow    [rank, seconds]          this rank sleeps before every step
once    path                     a file: where it is there, nothing is injected; it is made when the first fault comes
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_train.cli import config_from_words, main
from moe_train.data.loader import Loader, StepBatch
from moe_train.engine.native import NativeEngine

RANK = int(os.environ.get("RANK", "0"))


def patch(faults: dict[str, Any]) -> None:
    forward_backward, next_step = NativeEngine.forward_backward, Loader.next_step
    marker = Path(faults["once"]) if "once" in faults else None
    if marker is not None and marker.exists():
        return

    def hit() -> None:
        if marker is not None:
            marker.touch()

    def faulty_step(self: NativeEngine, batch: StepBatch, **rest: Any) -> Any:
        if faults.get("nan", [])[:2] != [self.steps_done + 1, RANK] or not faults["nan"][2]:
            return forward_backward(self, batch, **rest)
        faults["nan"][2] -= 1
        hit()
        return with_nan(self, lambda: forward_backward(self, batch, **rest))

    def faulty_batch(self: Loader) -> StepBatch:
        step = self._cursor // self._global_batch_size + 1
        if faults.get("slow", [None])[0] == RANK:
            time.sleep(faults["slow"][1])
        if faults.get("late", [])[:2] == [step, RANK]:
            hit()
            time.sleep(faults["late"][2])
        batch = next_step(self)
        if faults.get("poison") != step:
            return batch
        hit()
        return replace(batch, microbatches=[replace(m, **poisoned(m)) for m in batch.microbatches])

    NativeEngine.forward_backward, Loader.next_step = faulty_step, faulty_batch


def with_nan(engine: NativeEngine, run: Callable[[], Any]) -> Any:
    """Run a step in which the gradient of the last layer's output is NaN."""

    def spoil(module: Any, inputs: Any, output: Any) -> None:
        if output[0].hidden.requires_grad:
            output[0].hidden.register_hook(lambda gradient: gradient * torch.nan)

    layers = list(engine.model.parts[-1].layers.values())
    handle = layers[-1].register_forward_hook(spoil)
    try:
        return run()
    finally:
        handle.remove()


def poisoned(micro: Any) -> dict[str, torch.Tensor]:
    """Bytes that no text has, in an order of their own."""
    noise = torch.Generator().manual_seed(int(micro.rows[0]))
    tokens = torch.randint(128, 256, micro.tokens.shape, generator=noise)
    return {"tokens": tokens, "targets": torch.where(micro.targets >= 0, tokens.roll(7, 1), micro.targets)}


def run(words: list[str]) -> None:
    from moe_train.train import train

    patch(json.loads(words[0]))
    train(config_from_words(words[1:], "inject.py", ""), "injected")


if __name__ == "__main__":
    main(run, sys.argv[1:])
