"""The DeepSpeed engine: ZeRO around the native engine's model, with its losses, schedule, routers and checkpoints.

Our loss is a sum that is already divided by the counts of the whole step, and DeepSpeed averages over micro-batches and ranks, so
each micro-batch's loss is multiplied by both. All parameters are fp32 to DeepSpeed and read in the compute dtype inside of their
modules (`moe_train.parallel.plain`), so that routers stay fp32. Each step's norm is DeepSpeed's; where it is not accepted DeepSpeed is
told that it is not finite, and drops the gradients. Under expert parallelism DeepSpeed takes experts for a layer of its own MoE class.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.cpp_extension import _get_build_directory

from moe_train.config import Config
from moe_train.config.deepspeed import read_options
from moe_train.engine.model import Model
from moe_train.engine.native import NativeEngine
from moe_train.engine.zero import MOMENTS, Partitions
from moe_train.errors import UserError
from moe_train.model.decoder import Output
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo
from moe_train.model.transformer_xl import Memory
from moe_train.optim import clip_gradients, parameter_groups
from moe_train.parallel.mesh import World
from moe_train.parallel.plain import compute_in, make_plain

REFUSED = -1.0  # what DeepSpeed takes for a norm that is not finite


class DeepSpeedModel(Model):
    """The decoder with plain parameters, which ZeRO shares out."""

    zero: Partitions  # set when DeepSpeed has taken the model over
    split: set[nn.Parameter]  # those of which this rank has its own experts' part

    def materialise(self) -> Self:
        """Every rank makes all parameters but other ranks' experts."""
        super().materialise()
        make_plain(self.parts[0])
        if self.world.dtype != torch.float32:
            compute_in(self.parts[0], self.world.dtype)
        layers = [module for module in self.parts[0].modules() if isinstance(module, MoE)]
        self.split = {p for layer in layers for p in layer.experts.parameters()} if self.config.parallel.ep > 1 else set()
        return self

    def shared_out(self, parameter: nn.Parameter, whole: Tensor) -> DTensor:
        """A whole tensor of a parameter's shape as every layout's checkpoint has it: a part on each rank."""
        if parameter in self.split:
            # A view into ZeRO's buffer has an offset, and torch 2.13 cannot copy a DTensor with one to the host.
            return DTensor.from_local(whole.clone(), self.layout.experts["ep"], [Shard(0)], run_check=False)
        mesh, places = self.layout.dense["shard"], [Shard(0)]
        part = distribute_tensor(whole, mesh, places, src_data_rank=None).to_local()
        part = part.clone()  # a view would keep the whole tensor in memory
        return DTensor.from_local(part, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())

    def whole_of(self, parameter: nn.Parameter, shared: DTensor) -> Tensor:
        """What `shared_out` was given."""
        return shared.to_local() if parameter in self.split else shared.full_tensor()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under logical names."""
        state: dict[str, Any] = {name: self.shared_out(p, self.zero.weight(p)) for name, p in self.named_parameters()}
        return state | self._buffers()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, parameter in self.named_parameters():
            self.zero.set_weight(parameter, self.whole_of(parameter, state[name]))
        self.zero.weights_are_set()
        for name, buffer in self._buffers().items():
            buffer.copy_(state[name])

    def _buffers(self) -> dict[str, Tensor]:
        """Those that a checkpoint has."""
        parameters = {name for name, _ in self.named_parameters()}
        return {name: value for name, value in self.parts[0].state_dict().items() if name not in parameters}


class DeepSpeedEngine(NativeEngine):
    """See `moe_train.engine.base.Engine`."""

    model: DeepSpeedModel

    def __init__(self, config: Config, world: World) -> None:
        library = load_library()
        super().__init__(config, world)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it without torchrun, too
        # DeepSpeed would compile shared-memory collectives that inference alone uses, and wait for ever where that was killed once.
        library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        library.init_distributed(dist_init_required=False)  # groups of experts are made in its backend
        if config.parallel.ep > 1:
            _mark_experts(library, self.model, config.parallel.ep)
        # DeepSpeed calls collectives by names that torch 2.13 has renamed; both work.
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
        optimizer = self._make_optimizer(library)
        options = settings(config, world.size)
        self.runtime = library.initialize(
            model=self.model.parts[0], optimizer=optimizer, config=options, dist_init_required=False
        )[0]
        self.model.zero = Partitions(library, self.runtime, config.engine.zero_stage)

    def _make_optimizer(self, library: Any) -> torch.optim.Optimizer:
        """AdamW, or CPUAdam where the optimizer is on the CPU, over groups that do not mix experts with other parameters."""
        optim = self.config.optim
        named = [{**group, "name": str(i)} for i, group in enumerate(parameter_groups(self.model.parts[0], optim))]
        groups = library.moe.utils.split_params_into_different_moe_groups_for_optimizer(named)
        keys: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        if self.config.engine.offload == "none":
            return torch.optim.AdamW(groups, fused=True, **keys)
        compile_cpu_adam(library)
        made: torch.optim.Optimizer = library.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **keys)
        return made

    def _make_model(self) -> DeepSpeedModel:
        return DeepSpeedModel(self.config, self.world).materialise()

    def _make_optimizers(self) -> list[torch.optim.AdamW]:
        return []  # DeepSpeed has it

    def _accumulate(
        self, feed: list[tuple[BatchInfo, Tensor]], memories: list[Memory], mark: Callable[[str], None]
    ) -> list[Output]:
        """Forward and backward of each micro-batch in turn; ranks reduce gradients after the last one, or as the stage wants."""
        outputs, scale = [], self.world.size * len(feed)
        for i, (info, targets) in enumerate(feed):
            self.runtime.set_gradient_accumulation_boundary(i == len(feed) - 1)
            output = self.runtime(info, targets)
            mark("forward")
            self.runtime.backward(output.loss * scale)
            mark("backward")
            outputs.append(output._replace(loss=output.loss.detach(), carry=None))
        return outputs

    def _update(self, rate: float, accept: Callable[[float], bool]) -> tuple[float, bool]:
        """The gradient norm before clipping, and whether it was accepted and the parameters were updated."""
        for group in self.runtime.optimizer.param_groups:
            group["lr"] = rate
        stage = self.config.engine.zero_stage
        if stage > 0:
            return update_where_accepted(self.runtime, "_get_norm_groups" if stage == 3 else "scaled_global_norm", accept)
        parameters, used = [p for _, p in self.model.named_parameters()], False
        held = dict.fromkeys(self.model.split, 1 / self.config.parallel.ep)  # by this share of the ranks
        norm = float(clip_gradients(parameters, self.config.optim.clip_norm, held))
        try:
            used = accept(norm)
        finally:
            if not used:
                self.runtime.zero_grad()
        if used:
            self.runtime.step()
        return norm, used

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's gradient of the step, after `forward_backward` and before `step`."""
        for name, parameter in self.model.named_parameters():
            yield name, self.model.shared_out(parameter, self.model.zero.gradient(parameter))

    def state_dict(self) -> dict[str, Any]:
        """Model (router buffers included) and optimizer moments as the native engine's checkpoints have them."""
        zero, moments = self.model.zero, dict[str, Tensor]()
        for name, parameter in self._trained():
            moments[f"state.{name}.step"] = zero.step()
            for kind in MOMENTS:
                moments[f"state.{name}.{kind}"] = self.model.shared_out(parameter, zero.moment(parameter, kind))
        return {"model": self.model.state_dict(), "optimizer": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; hyperparameters stay those of the config."""
        self.model.load_state_dict(state["model"])
        moments, zero = state["optimizer"], self.model.zero
        steps = {float(moments[f"state.{name}.step"]) for name, _ in self._trained()}
        if len(steps) > 1:
            rule = f"the checkpoint has parameters with {sorted(steps)} updates, and ZeRO counts those of all together"
            raise UserError(f"engine.name=deepspeed: {rule}; use engine.name=native")
        zero.set_step(steps.pop())
        for name, parameter in self._trained():
            for kind in MOMENTS:
                zero.set_moment(parameter, kind, self.model.whole_of(parameter, moments[f"state.{name}.{kind}"]))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def update_where_accepted(runtime: Any, method: str, accept: Callable[[float], bool]) -> tuple[float, bool]:
    """A step of a ZeRO optimizer, whose `method` computes the norms of its groups, or of all: the norm, and what `accept` said to it.

    `accept` is asked between norm and update. Where it refuses, or raises, DeepSpeed drops the gradients.
    """
    optimizer, norm, errors = runtime.optimizer, float("nan"), list[BaseException]()
    compute = getattr(optimizer, method)

    def judged() -> Any:
        nonlocal norm
        found = compute()
        norms = torch.stack([torch.as_tensor(group) for group in found]) if isinstance(found, list) else found
        if bool((norms.isfinite() & (norms >= 0)).all()):  # DeepSpeed puts REFUSED for a norm that is not finite
            norm = float(norms.double().norm())
        try:
            if accept(norm):
                return found
        except BaseException as error:
            errors.append(error)
        refused = torch.full_like(norms, REFUSED)
        return list(refused) if isinstance(found, list) else refused

    setattr(optimizer, method, judged)
    try:
        runtime.step()
    finally:
        delattr(optimizer, method)
    if errors:
        raise errors[0]
    return norm, bool(runtime.was_step_applied())


def load_library() -> Any:
    """The package. Raises UserError where it cannot be imported."""
    try:
        import deepspeed
        import deepspeed.moe.layer
        import deepspeed.moe.utils
        import deepspeed.ops.adam
    except ImportError as error:
        rule = f"deepspeed cannot be imported ({error})"
        raise UserError(
            f"engine.name=deepspeed: {rule}; pip install 'moe_train[deepspeed]', or use engine.name=native"
        ) from None
    return deepspeed


def settings(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the options of `engine.deepspeed_json` and those that this configuration owns."""
    train, engine, options = config.train, config.engine, read_options(config.engine)
    zero = {**options.get("zero_optimization", {}), "stage": engine.zero_stage}
    if engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "steps_per_print": None,
        **options,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * ranks),
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else config.optim.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def _mark_experts(library: Any, model: DeepSpeedModel, ep: int) -> None:
    """Make experts what DeepSpeed reduces over its expert data-parallel groups: instances of its MoE class, with marked parameters."""
    library.utils.groups._create_expert_and_data_parallel(ep)
    group = f"ep_size_{ep}"
    for module in model.parts[0].modules():
        if not isinstance(module, MoE):
            continue
        experts, kind = module.experts, type(module.experts)
        facts = {"num_experts": experts.count, "num_local_experts": experts.count // ep, "expert_group_name": group}
        facts["set_deepspeed_parallelism"] = lambda *_: None  # the groups are there
        experts.__class__ = type(kind.__name__, (kind, library.moe.layer.MoE), facts)
        for parameter in experts.parameters():
            parameter.allreduce, parameter.group_name = False, group  # type: ignore[attr-defined]


def compile_cpu_adam(library: Any) -> None:
    """Compile DeepSpeed's CPUAdam, once on each machine while the other ranks wait. Raises UserError on all ranks where that fails."""
    problem = _compile_cpu_adam(library) if os.environ["LOCAL_RANK"] == "0" else None
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise UserError(f"engine.offload=optimizer: {found}, or use engine.offload=none")


def _compile_cpu_adam(library: Any) -> str | None:
    """What goes wrong, and a remedy."""
    lock = Path(_get_build_directory("cpu_adam", False), "lock")
    if lock.exists():
        return f"{lock} says that CPUAdam is being compiled, or was when a process was killed; wait for that process or delete the file"
    try:
        library.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # a compiler may fail in any way
        first = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
        return f"CPUAdam cannot be compiled: {type(error).__name__}: {first}; install a C++ compiler and ninja"
    return None
