"""What is wrong with a step: numbers that are not finite, spikes of loss and gradient norm, routers that have collapsed.

A spike is a value above median + sigmas * max(1.4826 MAD, 0.02 |median|) of the window of values before it that were used. The median
and the median absolute deviation do not follow the outliers that they are to find, and the floor keeps a loss that hardly moves from
being a spike at each tremor. Everything is computed from figures that all ranks have in common, so that they agree on what they find.
"""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from moe_train.config.faults import FaultsSection
from moe_train.engine.base import StepResult
from moe_train.errors import UserError

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.02  # of the median


class Finding(NamedTuple):
    """One thing that is wrong with a step."""

    cause: str  # nonfinite, loss_spike, grad_spike or collapse
    action: str  # warn, skip or stop
    text: str


class Detector:
    """Remembers the steps of a window; its state is a part of checkpoints, so that a run that goes on finds the same."""

    def __init__(self, config: FaultsSection) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.collapsed: dict[str, int] = {}  # layer -> steps in a row

    def look(self, result: StepResult, norm: float, tokens: int) -> list[Finding]:
        """What is wrong with the step of `tokens` tokens that gave these, the gravest first. `keep` it where it is used."""
        bad = [
            f"{name} is {value}" for name, value in (("loss", result.loss), ("gradient norm", norm)) if not math.isfinite(value)
        ]
        if bad:
            return [Finding("nonfinite", "skip", f"the {' and the '.join(bad)}")]
        config = self.config
        found = [
            *self._spike("loss_spike", config.loss_spike, "loss", result.loss, self.losses),
            *self._spike("grad_spike", config.grad_spike, "gradient norm", norm, self.norms),
            *self._collapse(result, tokens),
        ]
        return sorted(found, key=lambda finding: ("stop", "skip", "warn").index(finding.action))

    def keep(self, result: StepResult, norm: float) -> None:
        """The step was used: the next ones are compared with it."""
        self.losses.append(result.loss)
        self.norms.append(norm)

    def _spike(self, cause: str, action: str, name: str, value: float, before: deque[float]) -> list[Finding]:
        if action == "off" or len(before) < self.config.window:
            return []
        median = statistics.median(before)
        spread = MAD_TO_SIGMA * statistics.median(abs(x - median) for x in before)
        sigmas = (value - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)
        if sigmas <= self.config.spike_sigmas:
            return []
        limit = f"faults.spike_sigmas={self.config.spike_sigmas:g}"
        return [
            Finding(cause, action, f"the {name} {value:.6g} is {sigmas:.3g} sigmas above {median:.6g}, the median ({limit})")
        ]

    def _collapse(self, result: StepResult, tokens: int) -> list[Finding]:
        if self.config.collapse == "off":
            return []
        found = []
        for layer, sums in result.stats.items():
            if (reason := self._reason(sums, tokens)) is None:
                self.collapsed.pop(layer, None)
                continue
            steps = self.collapsed[layer] = self.collapsed.get(layer, 0) + 1
            # A warning is said once; a step can only be skipped, or end the run, while it lasts.
            if steps == self.config.window or (steps > self.config.window and self.config.collapse != "warn"):
                found.append(Finding("collapse", self.config.collapse, f"router of layer {layer}: {reason} for {steps} steps"))
        return found

    def _reason(self, sums: dict[str, Any], tokens: int) -> str | None:
        loads = sums["tokens_per_expert"]
        experts, dead = loads.numel(), int((loads == 0).sum())
        if dead > self.config.max_dead * experts:
            return f"{dead} of {experts} experts get no token (faults.max_dead={self.config.max_dead:g})"
        if "entropy" not in sums or experts < 2:
            return None
        share = float(sums["entropy"]) / max(tokens, 1) / math.log(experts)
        if share >= self.config.min_entropy:
            return None
        return f"the entropy of its scores is {share:.3g} of ln {experts} (faults.min_entropy={self.config.min_entropy:g})"

    def state_dict(self) -> dict[str, Any]:
        """The window as JSON."""
        return {"losses": list(self.losses), "norms": list(self.norms), "collapsed": dict(self.collapsed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a window, which may have been longer or shorter. Raises UserError where it is none."""
        try:
            self.losses.extend(map(float, state["losses"]))
            self.norms.extend(map(float, state["norms"]))
            self.collapsed = {str(layer): int(steps) for layer, steps in state["collapsed"].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's `faults` is no window of steps: {error!r}; use another checkpoint") from None
