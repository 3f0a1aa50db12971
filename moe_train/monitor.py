"""Who else gets the rows of metrics.jsonl: TensorBoard and Weights & Biases, both from the same numbers."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from moe_train.config.faults import MonitorSection
from moe_train.errors import UserError

TENSORBOARD_FOLDER = "tensorboard"
Scalars = Iterable[tuple[str, float]]  # (tag, value)


class Board(Protocol):
    """Something that draws curves."""

    def add(self, scalars: Scalars, step: int) -> None:
        """Take over the numbers of a row."""
        ...

    def flush(self) -> None:
        """Hand everything to the disk."""
        ...

    def close(self) -> None:
        """End."""
        ...


class TensorBoard:
    """Event files in tensorboard/ of the run folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here because reading metrics does not need it

        # Events of the steps to be repeated are hidden by TensorBoard, which cannot delete them.
        self.writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start_step + 1 if start_step else 0)

    def add(self, scalars: Scalars, step: int) -> None:
        """One event for each number."""
        for tag, value in scalars:
            self.writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Hand everything to the disk."""
        self.writer.flush()

    def close(self) -> None:
        """End."""
        self.writer.close()


class WandB:
    """Weights & Biases. A run that goes on keeps its id; steps that are repeated after a restart are not sent again.

    Its own collection of the machine, the environment, the command line, code and git state is off: only rows go there.
    """

    def __init__(self, folder: Path, start_step: int, monitor: MonitorSection) -> None:
        wandb = _import_wandb()
        settings = wandb.Settings(
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            console="off",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self.run: Any = wandb.init(
            project=monitor.wandb_project,
            name=folder.name,
            id=_identity(folder),
            dir=str(folder),
            mode=monitor.wandb,
            resume="allow" if monitor.wandb == "online" else None,
            settings=settings,
        )
        self.run.define_metric("*", step_metric="step")

    def add(self, scalars: Scalars, step: int) -> None:
        """One record with all numbers; `step` is one of them, since theirs cannot go back."""
        self.run.log({"step": step, **dict(scalars)})

    def flush(self) -> None:
        """It writes in the background."""

    def close(self) -> None:
        """Wait until everything is written, or sent."""
        self.run.finish()


def _import_wandb() -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise UserError("monitor.wandb: wandb is not installed; pip install 'moe_train[wandb]', or set it to off") from None
    return wandb


def _identity(folder: Path) -> str:
    """The run's name at Weights & Biases, the same at each start."""
    path = folder / "wandb" / "id.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()


def open_boards(monitor: MonitorSection, folder: Path, start_step: int) -> list[Board]:
    """What the config names. Raises UserError where it is not installed."""
    boards: list[Board] = [TensorBoard(folder, start_step)] if monitor.tensorboard else []
    return boards if monitor.wandb == "off" else [*boards, WandB(folder, start_step, monitor)]
