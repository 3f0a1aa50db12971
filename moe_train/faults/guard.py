"""Between a step's gradients and its update: what the trainer does about what `detect` finds.

All ranks decide the same, because they decide from sums over all ranks alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_train.checkpoint import dcp
from moe_train.config import Config
from moe_train.data.loader import StepBatch
from moe_train.engine.base import StepResult
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.faults import bundle
from moe_train.faults.detect import Detector, Finding
from moe_train.parallel.mesh import World

Report = Callable[[int, dict[str, Any]], None]


class Halted(UserError):
    """A run that ends because of its steps; nothing of the last one was used."""


class Guard:
    """Judges each step; keeps what `launch/replay.py` needs of those that are not used."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: Path,
        engine: NativeEngine,
        files: Callable[[], dict[str, bytes]],
        report: Report,
    ) -> None:
        """`files`: what a checkpoint has beside tensors, on rank 0. `report` gets a row of each finding."""
        self.config, self.world, self.folder, self.engine, self.files = config, world, folder, engine, files
        self.report = report
        self.detector = Detector(config.faults)
        self.skipped = 0  # in a row
        self.again = False  # whether the step that was judged last is to be computed once more
        self._tries = (0, 0)  # a step, and how often it was computed again

    def accepts(self, step: int, batch: StepBatch, result: StepResult, norm: float) -> bool:
        """Whether the step's gradients are to be used. Raises Halted where the run is to end."""
        findings = self.detector.look(result, norm, batch.token_count)
        tries = self._tries[1] if self._tries[0] == step else 0
        most = 0 if self.config.train.memory else self.config.faults.repeat  # rows before the step are not kept that long
        self.again = bool(findings) and findings[0].cause == "nonfinite" and tries < most
        if self.again:
            self._tries = (step, tries + 1)
            self.report(step, {"cause": "nonfinite", "action": "again", "text": findings[0].text, "bundle": None})
            return False
        used = not findings or findings[0].action == "warn"
        self.skipped = 0 if used else self.skipped + 1
        if used:
            self.detector.keep(result, norm)
        kept = "" if used else self._keep(step, batch, result, norm, findings[0])
        for finding in findings:
            self.report(step, {"cause": finding.cause, "action": finding.action, "text": finding.text, "bundle": kept or None})
        if used:
            return True
        reason = f"step {step}: {findings[0].text}"
        if findings[0].action == "stop":
            raise Halted(f"{reason}; faults.{findings[0].cause}=stop. {self._remedy(kept)}")
        if self.skipped >= self.config.faults.max_skipped:
            limit = f"skipped in a row: {self.skipped} steps, as many as faults.max_skipped"
            raise Halted(f"{reason}; {limit}. {self._remedy(kept)}")
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to know, as JSON."""
        return {"skipped": self.skipped, **self.detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.detector.load_state_dict(state)
        skipped = state.get("skipped")
        if type(skipped) is not int:
            raise UserError(f"the checkpoint's `faults.skipped` is {skipped!r}, no number of steps; use another checkpoint")
        self.skipped = skipped

    def _keep(self, step: int, batch: StepBatch, result: StepResult, norm: float, finding: Finding) -> str:
        """Write a bundle, where there is room for one; its path, or nothing. All ranks call this."""
        room = [bundle.count(self.folder) < self.config.faults.max_bundles]
        dist.broadcast_object_list(room)
        if not room[0]:
            return ""
        facts = {"cause": finding.cause, "text": finding.text, "loss": str(result.loss), "grad_norm": str(norm)}
        facts["checkpoint"] = next((path.name for path in reversed(dcp.checkpoints(self.folder / "checkpoints"))), "")
        weights = self.engine.model.state_dict()
        files: dict[str, bytes] = {}
        try:
            dcp.on_main(lambda: files.update(self.files()))  # where rank 0 alone fails, the others would wait for it
            since, fresh = step - self.skipped, self.skipped == 1
            path = bundle.save(self.folder, step, batch, weights, since, fresh, facts, self.config, self.world, files)
        except (OSError, dcp.NotSaved) as error:
            return f"not written: {error}"
        return str(path)

    def _remedy(self, kept: str) -> str:
        look = (
            f"python launch/replay.py {kept} shows where it begins" if kept.startswith(str(self.folder)) else "Look at the data"
        )
        return f"{look}; lower optim.lr, or change the data; the same command goes on from the last checkpoint"
