"""What `engine.name: deepspeed` can run, and what a file of DeepSpeed's own options may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_train.config.base import Conflict

if TYPE_CHECKING:
    from moe_train.config.run import Config
    from moe_train.config.sections import EngineSection

LARGEST_FILE = 1 << 18  # bytes
_NUMBERS = "train.dtype says which numbers are computed with"
_BATCH = "train.global_batch_size and train.micro_batch_size say how rows are shared out"
_SUMS = "losses are sums over the whole step, and gradients are summed"
_MONITOR = "monitor says who gets the rows of metrics.jsonl"
OWNED = {  # options that this configuration owns -> which key of ours says it
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": "optim.clip_norm says it",
    "optimizer": "the optimizer is AdamW, with the keys of optim",
    "scheduler": "the schedule is that of optim",
    "zero_allow_untested_optimizer": "the optimizer is AdamW, with the keys of optim",
    "zero_force_ds_cpu_optimizer": "engine.offload says which optimizer runs",
    "fp16": _NUMBERS,
    "bf16": _NUMBERS,
    "bfloat16": _NUMBERS,
    "amp": _NUMBERS,
    "torch_autocast": _NUMBERS,
    "data_types": _NUMBERS,
    "communication_data_type": "gradients are summed in fp32",
    "prescale_gradients": _SUMS,
    "gradient_predivide_factor": _SUMS,
    "gradient_allreduce_op": _SUMS,
    "sparse_gradients": _SUMS,
    "tensor_parallel": "parallel.tp says it",
    "sequence_parallel_size": "parallel.cp says it",
    "expert_parallel": "parallel.ep says it",
    "use_data_before_expert_parallelism": "parallel.ep says where experts are",
    "pipeline": "parallel.pp says it",
    "activation_checkpointing": "train.recompute says it",
    "compile": "train.compile says it",
    "checkpoint": "checkpoints are those of the native engine, with the keys of checkpoint",
    "data_efficiency": "data says what is trained on",
    "curriculum_learning": "data says what is trained on",
    "compression_training": "the model is that of model",
    "hybrid_engine": "the model is that of model",
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "autotuning": "launch/benchmark.py times a run",
    "flops_profiler.output_file": "a run writes into its own folder",
    "zero_optimization.compute_grad_norm": "faults judges every step by its norm",
    "zero_optimization.stage": "engine.zero_stage says it",
    "zero_optimization.offload_optimizer": "engine.offload says it",
    "zero_optimization.cpu_offload": "engine.offload says it",
    "zero_optimization.offload_param": "parameters stay on the device",
    "zero_optimization.cpu_offload_params": "parameters stay on the device",
    "zero_optimization.zenflow": "each step updates every parameter",
    "zero_optimization.leaf_module": "blocks are fetched by the model's own modules",
    "zero_optimization.zero_quantized_weights": _NUMBERS,
    "zero_optimization.zero_quantized_nontrainable_weights": _NUMBERS,
    "zero_optimization.zero_quantized_gradients": _NUMBERS,
}


def deepspeed_conflicts(config: Config) -> list[Conflict]:
    """Why DeepSpeed cannot run this; or, under another engine, keys that are DeepSpeed's alone."""
    engine = config.engine
    if engine.name != "deepspeed":
        rule, remedy = "is for engine.name=deepspeed", "leave it out"
        defaults = type(engine)()
        keys = ("zero_stage", "offload", "deepspeed_json")
        given = {key: getattr(engine, key) for key in keys if getattr(engine, key) != getattr(defaults, key)}
        return [Conflict(f"engine.{key}", value, rule, remedy) for key, value in given.items()]
    return [*_layout_conflicts(config), *_training_conflicts(config), *_json_conflicts(engine)]


def _layout_conflicts(config: Config) -> list[Conflict]:
    parallel, engine = config.parallel, config.engine
    axes = {axis: getattr(parallel, axis) for axis in ("dp_replicate", "tp", "pp", "cp", "expert_tp")}
    rule = "engine.name=deepspeed has data and expert parallelism only"
    found = [Conflict(f"parallel.{axis}", n, rule, "use 1, or engine.name=native") for axis, n in axes.items() if n > 1]
    if parallel.sharding != "gradients":
        rule = f"engine.zero_stage={engine.zero_stage} says what DeepSpeed's ranks share out"
        found.append(Conflict("parallel.sharding", parallel.sharding, rule, "leave it out"))
    if parallel.ep > 1 and engine.zero_stage == 3:
        rule = "DeepSpeed shares experts out over ranks up to ZeRO stage 2"
        found.append(Conflict("engine.zero_stage", engine.zero_stage, rule, "use 2, or parallel.ep=1"))
    return found


def _training_conflicts(config: Config) -> list[Conflict]:
    train, engine, router, found = config.train, config.engine, config.model.router, []
    if train.dtype == "fp64":
        found.append(Conflict("train.dtype", "fp64", "ZeRO keeps fp32 masters", "use fp32, or engine.name=native"))
    if train.compile:
        rule = "compiled blocks are not run under DeepSpeed"
        found.append(Conflict("train.compile", True, rule, "set it to false, or engine.name=native"))
    if train.memory:
        rule = "memory between steps is kept by the native engine only"
        found.append(Conflict("train.memory", train.memory, rule, "set it to 0, or engine.name=native"))
    if engine.offload != "none" and engine.zero_stage == 0:
        rule = "DeepSpeed moves an optimizer to the CPU from ZeRO stage 1 on"
        found.append(Conflict("engine.offload", engine.offload, rule, "use engine.zero_stage=1 or more"))
    if router.freezes:
        rule = "freezes parameters in mid-run, and ZeRO updates all parameters of a group together"
        found.append(Conflict("model.router.name", router.name, rule, "use engine.name=native"))
    return found


def _json_conflicts(engine: EngineSection) -> list[Conflict]:
    try:
        options = read_options(engine)
    except (OSError, ValueError) as error:
        rule = f"is not a file with a JSON object: {' '.join(str(error).split())[:200]}"
        return [Conflict("engine.deepspeed_json", engine.deepspeed_json, rule, "give another path, or leave it out")]
    found = []
    for path, rule in OWNED.items():
        section, _, key = path.rpartition(".")
        there = options.get(section, {}) if section else options
        if isinstance(there, dict) and key in there:
            where = f"engine.deepspeed_json: {path}"
            found.append(Conflict(where, json.dumps(there[key])[:80], rule, "leave it out of the file"))
    if not isinstance(options.get("zero_optimization", {}), dict):
        rule = "must be an object of options"
        found.append(
            Conflict("engine.deepspeed_json: zero_optimization", options["zero_optimization"], rule, "change the file")
        )
    return found


def read_options(engine: EngineSection) -> dict[str, Any]:
    """DeepSpeed's own options from `engine.deepspeed_json`; none without it. Raises OSError and ValueError."""
    if engine.deepspeed_json is None:
        return {}
    path = Path(engine.deepspeed_json)
    if not path.is_file():  # a pipe would never end
        raise ValueError("no such file")
    with path.open("rb") as file:
        text = file.read(LARGEST_FILE + 1)
    if len(text) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    try:
        options = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(options, dict):
        raise ValueError(f"it holds a {type(options).__name__}")
    return options
