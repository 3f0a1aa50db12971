"""The sections on what goes wrong and who hears of it: faults and monitor."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from moe_train.config.base import Conflict, Section

Action = Literal["off", "warn", "skip", "stop"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class FaultsSection(Section):
    """What a run does about steps that go wrong. A skipped step changes no weight; its data is used up."""

    max_skipped: PositiveInt = 3
    """skipped steps in a row that end the run; a loss or gradient norm that is not finite always skips the step"""
    repeat: NonNegativeInt = 1
    """times that a step with a loss or gradient norm that is not finite is computed again before it is skipped: what a device or a
    link got wrong once does not come again, and the run goes on as if nothing had been. Not with train.memory"""
    max_bundles: NonNegativeInt = 8
    """steps of a run that are kept for launch/replay.py, in faults/ of the run folder; each holds the weights"""
    loss_spike: Action = "warn"
    """what a loss far above those before it causes; every action but `off` says so"""
    grad_spike: Action = "warn"
    """what a gradient norm far above those before it causes"""
    spike_sigmas: PositiveFloat = 10.0
    """how far: robust standard deviations (1.48 median absolute deviations) above the median of the window"""
    collapse: Action = "warn"
    """what a router causes that uses a few experts only, in every step of the window"""
    min_entropy: Share = 0.01
    """a layer's router has collapsed where its mean entropy is below this share of ln(experts)"""
    max_dead: Share = 0.5
    """a layer's router has collapsed where more than this share of its experts gets no token"""
    window: PositiveInt = 64
    """steps that are looked back on; nothing is found before there are as many"""
    hang_seconds: PositiveFloat | None = None
    """time without the end of a step after which every rank writes its stacks to its log; null = half of parallel.timeout_seconds"""
    straggler_factor: Annotated[float, Field(gt=1.0)] | None = 1.5
    """a rank that works this many times as long as the median of the others is named; null = ranks are not timed"""

    def conflicts(self) -> list[Conflict]:
        """Rules between the keys."""
        if self.window >= 4:
            return []
        return [Conflict("faults.window", self.window, "a median of fewer than 4 steps says nothing", "raise it")]


class MonitorSection(Section):
    """Who else gets the rows of metrics.jsonl."""

    tensorboard: bool = True
    """event files in tensorboard/ of the run folder"""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; offline: files in wandb/ of the run folder, which `wandb sync` sends later. Needs the extra [wandb]"""
    wandb_project: str = "moe_train"
    """project there"""
