"""Whole tensors from what DeepSpeed's ZeRO keeps of them on the ranks, and back.

Stage 0 keeps everything on each rank. Stages 1 and 2 keep the parameters whole, and fp32 masters and moments as this rank's part of all
parameters of a group, one behind the other. Stage 3 keeps parts of the parameters too. Parameters are fp32 here, so that a weight and
its master are the same number.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partitions:
    """The state of DeepSpeed's engine `runtime` by parameter. Every rank calls a method for the same parameters in the same order.

    A whole tensor is this rank's experts where expert parallelism has split them. `library` is the package.
    """

    def __init__(self, library: Any, runtime: Any, stage: int) -> None:
        self.library, self.runtime, self.stage = library, runtime, stage
        self.sharded = runtime.optimizer  # ZeRO's optimizer; the plain one in stage 0
        self.optimizer = runtime.basic_optimizer
        self._make_moments()

    def _updated(self) -> list[Tensor]:
        """What the optimizer updates on this rank."""
        if self.stage == 0:
            return [p for group in self.optimizer.param_groups for p in group["params"]]
        parts: list[Tensor]
        parts = self.sharded.fp32_partitioned_groups_flat if self.stage == 3 else self.sharded.single_partition_of_fp32_groups
        return parts

    def _make_moments(self) -> None:
        """Give the optimizer the state that it would make in its first step, so that a checkpoint can be read into it before."""
        for part in self._updated():
            self.optimizer.state[part] = {"step": 0, **{kind: torch.zeros_like(part) for kind in MOMENTS}}
        self.set_step(0)
        if self.stage in (1, 2):
            self.sharded._lazy_init_hp_params_optimizer_state()

    def step(self) -> Tensor:
        """Updates done, fp32 []."""
        return torch.tensor(float(self.optimizer.state[self._updated()[0]]["step"]))

    def set_step(self, done: float) -> None:
        """Set the updates done of all parameters."""
        for part in self._updated():  # torch's AdamW counts in a tensor, CPUAdam in an int
            counts = isinstance(self.optimizer, torch.optim.AdamW)
            self.optimizer.state[part]["step"] = torch.tensor(float(done), device=part.device) if counts else int(done)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """A whole parameter."""
        if self.stage < 3:
            return parameter.detach()
        with self.library.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Give a parameter a value, which `weights_are_set` makes the optimizer's, too."""
        if self.stage < 3:
            parameter.data.copy_(whole)
            return
        with self.library.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)

    def weights_are_set(self) -> None:
        """What every rank calls after the last `set_weight`."""
        if self.stage:
            self.sharded.refresh_fp32_params()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """A whole gradient, after the last backward pass of a step; zeros where a parameter is frozen."""
        found = parameter.grad if self.stage == 0 else self.library.utils.safe_get_full_grad(parameter)
        return torch.zeros_like(self.weight(parameter)) if found is None else found

    def moment(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """A whole moment, one of MOMENTS."""
        if self.stage == 0:
            return self.optimizer.state[parameter][kind].clone()
        found: Tensor = self.library.utils.safe_get_full_optimizer_state(parameter, kind)
        return found

    def set_moment(self, parameter: Any, kind: str, whole: Tensor) -> None:
        """Take over a whole moment."""
        if self.stage == 0:
            self.optimizer.state[parameter][kind].copy_(whole)
        elif self.stage < 3:
            self.library.utils.safe_set_full_optimizer_state(parameter, whole, kind)
        else:  # equal parts, the last one padded
            size = parameter.ds_tensor.numel()
            padded = F.pad(whole.flatten(), (0, size * self.runtime.dp_world_size - whole.numel()))
            part = padded.narrow(0, size * self.runtime.global_rank, size)
            self.library.utils.safe_set_local_optimizer_state(parameter, part, kind)
