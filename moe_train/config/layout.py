"""Rules between the layout, the model and the batch, so that an impossible layout is refused before any process group exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.config.base import Conflict
from moe_train.errors import UserError

if TYPE_CHECKING:
    from moe_train.config.run import Config


def check_layout(config: Config, size: int) -> None:
    """Raise UserError with every reason why `config` cannot run on `size` ranks."""
    if problems := config.layout_conflicts(size):
        raise UserError("\n".join([f"layout on {size} ranks: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))


def world_conflicts(config: Config, world_size: int) -> list[Conflict]:
    """Every broken rule of the layout on `world_size` ranks."""
    parallel = config.parallel
    fixed = parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp
    if world_size % fixed:
        rule = f"with dp_replicate*tp*pp*cp={fixed}, the number of ranks must be a multiple of {fixed}"
        return [Conflict("world size", world_size, rule, "change the axes or --nproc-per-node")]
    if parallel.dp_shard != "auto" and parallel.dp_shard * fixed != world_size:
        rule = f"times dp_replicate*tp*pp*cp={fixed} must be the number of ranks, {world_size}"
        return [Conflict("parallel.dp_shard", parallel.dp_shard, rule, "use auto")]
    shard = world_size // fixed
    return [*_batch_conflicts(config, parallel.dp_replicate * shard), *_expert_conflicts(config, shard)]


def _batch_conflicts(config: Config, data_ranks: int) -> list[Conflict]:
    train, parallel = config.train, config.parallel
    found = []
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % (micro * data_ranks):
        rule = f"must be a multiple of train.micro_batch_size={micro} times {data_ranks} data-parallel ranks"
        found.append(Conflict("train.global_batch_size", batch, rule, "change the batch or the ranks"))
        return found
    count = batch // (micro * data_ranks)
    if parallel.pp_schedule == "1f1b" and count < parallel.pp:
        rule = f"gives {count} micro-batches to each pipeline; 1f1b needs at least pp={parallel.pp}"
        remedy = "raise it, lower train.micro_batch_size, or use parallel.pp_schedule=gpipe"
        found.append(Conflict("train.global_batch_size", batch, rule, remedy))
    if parallel.pp > 1 and parallel.pp_schedule == "dualpipev" and count < 2 * parallel.pp:
        rule = f"gives {count} micro-batches to each pipeline; dualpipev needs at least 2*pp={2 * parallel.pp}"
        found.append(Conflict("train.global_batch_size", batch, rule, "raise it or use another parallel.pp_schedule"))
    if parallel.pp > 1 and parallel.pp_schedule == "interleaved" and count % parallel.pp:
        rule = f"gives {count} micro-batches to each pipeline; interleaved needs a multiple of pp={parallel.pp}"
        found.append(Conflict("train.global_batch_size", batch, rule, "change it or use another parallel.pp_schedule"))
    return found


def _expert_conflicts(config: Config, dp_shard: int) -> list[Conflict]:
    parallel = config.parallel
    if dp_shard * parallel.cp % parallel.ep:
        rule = f"must divide dp_shard*cp={dp_shard}*{parallel.cp}, whose ranks share the experts out"
        return [Conflict("parallel.ep", parallel.ep, rule, "use a divisor")]
    return []


def sharding_conflicts(config: Config) -> list[Conflict]:
    """Rules between the model's and rows' sizes and the axes that divide them."""
    parallel, model, train = config.parallel, config.model, config.train
    tp, cp = parallel.tp, parallel.cp
    divided: list[tuple[str, int, str, int]] = [
        ("model.num_heads", model.num_heads, "parallel.tp", tp),
        ("model.num_kv_heads", model.kv_heads, "parallel.tp", tp),
        ("model.num_experts", model.num_experts, "parallel.ep", parallel.ep),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.expert_tp", parallel.expert_tp),
        ("model.shared_expert_size", model.shared_expert_size, "parallel.tp", tp),
    ]
    if model.has_dense_layers:
        divided.append(("model.dense_ffn_hidden_size", model.dense_size, "parallel.tp", tp))
    if model.vocab_size:
        divided.append(("model.vocab_size", model.vocab_size, "parallel.tp", tp))
    if model.num_classes:
        divided.append(("model.num_classes", model.num_classes, "parallel.tp", tp))
    if cp > 1 and parallel.cp_method == "ulysses":
        divided += [("model.num_heads", model.num_heads, "parallel.tp * parallel.cp", tp * cp)]
        divided += [("model.num_kv_heads", model.kv_heads, "parallel.tp * parallel.cp", tp * cp)]
        divided.append(("train.seq_len", train.seq_len, "parallel.cp * parallel.tp", cp * tp))
    elif cp > 1:
        divided.append(("train.seq_len", train.seq_len, "2 * parallel.cp * parallel.tp", 2 * cp * tp))
    else:
        divided.append(("train.seq_len", train.seq_len, "parallel.tp", tp))
    remedy = "change one of the two"
    found = [Conflict(key, n, f"must be a multiple of {name}={axis}", remedy) for key, n, name, axis in divided if n % axis]
    if tp > 1 and model.qk_norm == "width":
        rule = "splits the heads, and model.qk_norm=width norms all of them together"
        found.append(Conflict("parallel.tp", tp, rule, "use 1"))
    return found + _pipeline_conflicts(config)


def _pipeline_conflicts(config: Config) -> list[Conflict]:
    parallel, model = config.parallel, config.model
    if parallel.pp == 1:
        return []
    found = []
    if model.num_layers < parallel.stages:
        rule = f"must be at least the {parallel.stages} pipeline stages (pp={parallel.pp}, {parallel.pp_schedule})"
        found.append(Conflict("model.num_layers", model.num_layers, rule, "add layers or lower parallel.pp"))
    if parallel.pp_layers is not None and sum(parallel.pp_layers) != model.num_layers:
        rule = f"must add up to model.num_layers={model.num_layers}"
        found.append(Conflict("parallel.pp_layers", parallel.pp_layers, rule, "change it"))
    if config.train.recompute != "none" and parallel.pp_schedule in ("zbv", "dualpipev"):
        rule = f"with pp_schedule={parallel.pp_schedule} a layer would be recomputed up to ten times"
        found.append(Conflict("train.recompute", config.train.recompute, rule, "use 1f1b or interleaved, or recompute none"))
    return found
