"""The whole run: every section, and the rules between them."""

from __future__ import annotations

from pydantic import Field

from moe_train.config.base import Conflict, Section
from moe_train.config.deepspeed import deepspeed_conflicts
from moe_train.config.faults import FaultsSection, MonitorSection
from moe_train.config.kernels import kernel_conflicts
from moe_train.config.layout import sharding_conflicts, world_conflicts
from moe_train.config.memory import training_conflicts
from moe_train.config.model import ModelConfig
from moe_train.config.parallel import ParallelSection
from moe_train.config.sections import (
    CheckpointSection,
    DataSection,
    EngineSection,
    EvalSection,
    KernelsSection,
    OptimSection,
    RunSection,
    SampleSection,
    TrainSection,
)
from moe_train.config.sft import SftSection, sft_conflicts


class Config(Section):
    """A run."""

    run: RunSection = RunSection()
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    kernels: KernelsSection = KernelsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    sample: SampleSection = SampleSection()
    faults: FaultsSection = FaultsSection()
    monitor: MonitorSection = MonitorSection()
    sft: SftSection = SftSection()

    def conflicts(self) -> list[Conflict]:
        """Every broken rule between keys that can be seen without knowing the number of ranks."""
        found = [*self.model.conflicts(), *self.data.conflicts(), *self.parallel.conflicts(), *sharding_conflicts(self)]
        found += self.faults.conflicts()
        found += [*self.model.router.layout_conflicts(self.parallel), *self.optim.conflicts(), *sft_conflicts(self)]
        found += [*training_conflicts(self), *deepspeed_conflicts(self)]
        if self.model.block == "transformer_xl":
            axes = {axis: getattr(self.parallel, axis) for axis in ("tp", "pp", "cp", "ep", "expert_tp")}
            rule = "model.block=transformer_xl runs in one process or data parallel"
            found += [Conflict(f"parallel.{axis}", n, rule, "use 1, or model.block=llama") for axis, n in axes.items() if n > 1]
        train = self.train
        if train.global_batch_size % train.micro_batch_size:
            rule = f"must be a multiple of train.micro_batch_size={train.micro_batch_size}"
            found.append(Conflict("train.global_batch_size", train.global_batch_size, rule, "change one of the two"))
        rule, remedy = "an empty list names nothing", "name a path, or leave it out"
        lists = [
            (f"{name}.{key}", getattr(getattr(self, name), key))
            for name in ("data", "sft")
            for key in ("train", "valid", "test")
        ]
        found += [Conflict(path, value, rule, remedy) for path, value in lists if value == []]
        found += kernel_conflicts(self)
        return found

    def layout_conflicts(self, world_size: int) -> list[Conflict]:
        """Every broken rule of the layout on `world_size` ranks."""
        return world_conflicts(self, world_size)


def build_schema() -> None:
    """Make `Config` know the routers registered until now; reading a run calls it."""
    ModelConfig.model_rebuild(force=True)
    Config.model_rebuild(force=True)
