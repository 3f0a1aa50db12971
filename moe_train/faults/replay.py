"""Computing a kept step again in one process, watching for the first value that is not finite.

Every module's inputs and outputs are looked at in the order in which they come about, and in the backward pass the gradients of the
outputs, so that the first one is where the fault begins. Hooks see it; the model is the one that was trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from moe_train.checkpoint import dcp
from moe_train.cli import merge, parse, read_override
from moe_train.config import Config
from moe_train.engine.model import Model
from moe_train.errors import UserError
from moe_train.evaluate import PLAIN
from moe_train.faults.bundle import Bundle, load
from moe_train.model.decoder import Output
from moe_train.parallel.mesh import start_world


@dataclass
class Outcome:
    """What one micro-batch gave."""

    number: int
    rank: int  # the first that had it
    loss: float  # its share of the step's
    worst_row: int  # by nats per token
    worst_nats: float
    first: str | None  # where the first value that is not finite was, if there is one
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient is not finite


@dataclass
class Replay:
    """What a bundle gave in this process."""

    bundle: Bundle
    weights: list[str]  # parameters and buffers that are not finite before the step
    outcomes: list[Outcome]

    @property
    def finite(self) -> bool:
        """Whether everything is."""
        return not self.weights and all(o.first is None and not o.gradients for o in self.outcomes)

    @property
    def loss(self) -> float:
        """Of the whole step."""
        return sum(outcome.loss for outcome in self.outcomes)


def replay(path: Path, overrides: list[str]) -> Replay:
    """Compute the step of the bundle at `path` again, with `overrides` of its config. Raises UserError where it cannot be."""
    bundle = load(path)
    config = _config(bundle, overrides)
    world = start_world(config)
    if world.size > 1:
        raise UserError(f"launch/replay.py runs in one process, not in {world.size}; leave out torchrun")
    model = Model(config, world).materialise()
    state = {"model": model.state_dict()}
    dcp.load(bundle.weights, state)
    model.load_state_dict(state["model"])
    named = [item for part in model.parts for item in (*part.named_parameters(), *part.named_buffers())]
    bad = [f"{name}: {text}" for name, value in named if (text := not_finite(value))]
    return Replay(bundle, bad, [_micro_batch(model, bundle, i) for i in range(len(bundle.batch.microbatches))])


def _config(bundle: Bundle, overrides: list[str]) -> Config:
    content = bundle.facts["config"]
    for word in [*PLAIN, f"train.dtype={bundle.facts['dtype']}", "train.recompute=none", "train.compile=false", *overrides]:
        content = merge(content, read_override(word))
    return parse(content, str(bundle.path))


def _micro_batch(model: Model, bundle: Bundle, number: int) -> Outcome:
    """Forward and backward of one micro-batch."""
    micro, part = bundle.batch.microbatches[number], model.parts[0]
    model.train()
    part.zero_grad(set_to_none=True)
    info = model.batch_info(micro, bundle.batch, bundle.step - 1)
    trace: list[str] = []
    with Hooks(part, trace.append):
        output: Output = part(info, micro.targets.to(info.tokens.device))
        assert output.loss is not None
        assert output.token_loss is not None
        if text := not_finite(output.loss):
            trace.append(f"forward: the loss: {text}")
        output.loss.backward()
    grads = [f"{name}: {text}" for name, p in part.named_parameters() if p.grad is not None and (text := not_finite(p.grad))]
    nats = output.token_loss.detach().double().sum(1) / (micro.targets >= 0).sum(1).clamp(min=1).to(output.token_loss.device)
    worst = int(nats.nan_to_num(nan=torch.inf).argmax())
    loss = float(output.loss.detach())
    return Outcome(
        number, bundle.ranks[number], loss, int(micro.rows[worst]), float(nats[worst]), next(iter(trace), None), grads
    )


class Hooks:
    """Context manager that tells `found` of values of a model's forward and backward pass that are not finite, as they come about."""

    def __init__(self, model: nn.Module, found: Callable[[str], None]) -> None:
        self.model, self.found = model, found
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            where = f"{name or 'the model'} ({type(module).__name__})"
            self.handles.append(module.register_forward_pre_hook(partial(self._before, where)))
            self.handles.append(module.register_forward_hook(partial(self._after, where)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, where: str, module: nn.Module, inputs: Any) -> None:
        self._look(f"forward: an input of {where}", inputs)

    def _after(self, where: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._look(f"forward: an output of {where}", output)
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_floating_point():
                tensor.register_hook(partial(self._look, f"backward: the gradient of an output of {where}"))

    def _look(self, what: str, values: Any) -> None:
        for tensor in tree_flatten(values)[0]:
            if isinstance(tensor, Tensor) and (text := not_finite(tensor)):
                self.found(f"{what}: {text}")
                return


def not_finite(tensor: Tensor) -> str:
    """What is not finite in a tensor, in words; empty where everything is."""
    if not tensor.is_floating_point():
        return ""
    nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    parts = [f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} of {tensor.numel()} values, {list(tensor.shape)}" if parts else ""
