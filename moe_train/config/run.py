"""The whole run: every section, and the rules between them."""

from __future__ import annotations

from pydantic import Field

from moe_train.config.base import Conflict, Section
from moe_train.config.layout import sharding_conflicts, world_conflicts
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

    def conflicts(self) -> list[Conflict]:
        """Every broken rule between keys that can be seen without knowing the number of ranks."""
        found = [*self.model.conflicts(), *self.data.conflicts(), *self.parallel.conflicts(), *sharding_conflicts(self)]
        found += self.model.router.layout_conflicts(self.parallel)
        if self.model.block == "transformer_xl":
            axes = {axis: getattr(self.parallel, axis) for axis in ("tp", "pp", "cp", "ep", "expert_tp")}
            rule = "model.block=transformer_xl runs in one process or data parallel"
            found += [Conflict(f"parallel.{axis}", n, rule, "use 1, or model.block=llama") for axis, n in axes.items() if n > 1]
        train, optim = self.train, self.optim
        if train.global_batch_size % train.micro_batch_size:
            rule = f"must be a multiple of train.micro_batch_size={train.micro_batch_size}"
            found.append(Conflict("train.global_batch_size", train.global_batch_size, rule, "change one of the two"))
        if optim.min_lr > optim.lr:
            found.append(Conflict("optim.min_lr", optim.min_lr, f"must be at most optim.lr={optim.lr}", "lower it"))
        if train.device == "cpu" and self.kernels.backend == "triton":
            rule = "needs CUDA, and train.device is cpu"
            found.append(Conflict("kernels.backend", "triton", rule, "use auto"))
        if train.dtype == "fp64" and self.kernels.backend not in ("reference", "torch"):
            rule = "must be reference or torch where train.dtype is fp64"
            found.append(Conflict("kernels.backend", self.kernels.backend, rule, "set it to one of the two"))
        return found

    def layout_conflicts(self, world_size: int) -> list[Conflict]:
        """Every broken rule of the layout on `world_size` ranks."""
        return world_conflicts(self, world_size)


def build_schema() -> None:
    """Make `Config` know the routers registered until now; reading a run calls it."""
    ModelConfig.model_rebuild(force=True)
    Config.model_rebuild(force=True)
