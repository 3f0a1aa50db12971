"""Whether a layout changes what is computed: the first steps of a run in one process and on ranks, number by number.

Both do the same additions in another order, so they differ by rounding alone, and LIMITS say how much that may be: |a - b| / |b|, for
each tensor as a whole. Optimizers need one precaution. AdamW divides a gradient by its own size, so that an element whose gradient
is nothing but rounding moves by a whole learning rate in either direction, whatever computed it. An epsilon of about the size of the
gradients (EPS) makes the update a smooth function of them, without which no layout, and no other order of additions, is exact.
For the same reason a gradient that is 0 in exact arithmetic (SMEAR's router has one: a softmax does not see what is added to all
logits) cannot be compared: a tensor counts as 0 where it is smaller than the rounding of all gradients together, or all weights.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_train.cli import merge, parse, read_override
from moe_train.config import Config
from moe_train.data.corpus import build_default_corpus
from moe_train.engine.choose import make_engine
from moe_train.errors import UserError
from moe_train.parallel.mesh import start_world
from moe_train.pretraining import DEFAULT_CORPUS, data_loader, settle_vocabulary
from moe_train.ranks import run_ranks

STEPS = 3
EPS = 1e-3
LIMITS = {  # of relative differences; of `tokens` per expert the limit is of the count: not one of them goes elsewhere
    "fp32": {"loss": 2e-6, "gradients": 1e-5, "weights": 1e-5, "tokens": 0.5},
    "fp64": {"loss": 1e-10, "gradients": 1e-10, "weights": 1e-10, "tokens": 0.5},
}
NATIVE = {"engine": {"name": "native", "zero_stage": 2, "offload": "none", "deepspeed_json": None}}
ONE_PROCESS = {
    "dp_replicate": 1,
    "dp_shard": "auto",
    "tp": 1,
    "pp": 1,
    "pp_layers": None,
    "cp": 1,
    "ep": 1,
    "expert_tp": 1,
}
USUAL = (  # layouts that are compared where none is named, as far as the machine has a core for each rank
    "dp_shard=2",
    "dp_shard=2,sharding=parameters",
    "tp=2",
    "cp=2",
    "cp=2,cp_method=ulysses",
    "ep=2",
    "pp=2",
    "pp=2,pp_schedule=interleaved",
    "pp=2,pp_schedule=zbv",
    "dp_replicate=2,dp_shard=2",
    "ep=4",
    "tp=2,ep=2",
    "tp=2,ep=2,expert_tp=2",
    "cp=2,ep=2",
    "pp=2,ep=2",
    "pp=2,tp=2",
    "pp=2,tp=2,ep=2",
    "pp=2,cp=2,ep=4",
)

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # `whole` is not meant to be fast

Found = dict[str, float]  # what was compared -> its relative difference


def prepare(config: Config) -> Config:
    """The run as it is compared: on the CPU, in fp32 unless it asks for fp64, with AdamW's epsilon at least EPS."""
    if config.train.dtype == "bf16":
        raise UserError(
            "train.dtype=bf16: rounds too much to tell a layout that is wrong from one that is right; use fp32 or fp64"
        )
    dtype = "fp32" if config.train.dtype == "auto" else config.train.dtype
    config, _ = settle_vocabulary(config)
    train = config.data.train or str(build_default_corpus(DEFAULT_CORPUS, config.data.tokenizer)["train"])
    changes = {
        "train": {"device": "cpu", "dtype": dtype},
        "optim": {"eps": max(config.optim.eps, EPS)},
        "data": {"train": train},
    }
    return parse(merge(config.model_dump(mode="json"), changes), "the run as it is compared")


class Trial(NamedTuple):
    """A run under a layout."""

    layout: str
    config: Config
    ranks: int


def lay_out(config: Config, layout: str) -> Trial:
    """`config` under a layout such as `tp=2,ep=2`. Raises UserError where the two do not go together.

    A layout is keys of `parallel` (or whole paths, `train.recompute=full`) with commas between; other sizes are 1, but for dp_shard,
    which is as small as `ep` allows.
    """
    content = merge(config.model_dump(mode="json"), {"parallel": ONE_PROCESS})
    for word in re.split(r",(?=[a-z_.]+=)", layout) if layout else ():
        content = merge(content, read_override(word if "." in word.partition("=")[0] else f"parallel.{word}"))
    config = parse(content, layout)
    parallel = config.parallel
    shard = parallel.ep // math.gcd(parallel.ep, parallel.cp) if parallel.dp_shard == "auto" else parallel.dp_shard
    ranks = parallel.dp_replicate * shard * parallel.pp * parallel.cp * parallel.tp
    if problems := config.layout_conflicts(ranks):
        raise UserError("\n".join([f"{layout}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    return Trial(layout, config, ranks)


def usual(config: Config, cores: int) -> list[Trial | UserError]:
    """The config's own layout, and usual ones that need no more than `cores` ranks (two, if there is one core)."""
    sizes = config.parallel.model_dump()
    own = ",".join(f"{key}={sizes[key]}" for key, one in ONE_PROCESS.items() if sizes[key] != one)
    found: list[Trial | UserError] = []
    for layout in [own] * bool(own) + [layout for layout in USUAL if layout != own]:
        try:
            trial = lay_out(config, layout)
        except UserError as error:
            found.append(error)
            continue
        if layout == own or trial.ranks <= max(cores, 2):
            found.append(trial)
    return found


def observe(config: Config) -> Iterator[tuple[str, Tensor]]:
    """What the first steps of a run compute on these ranks, as whole tensors with names; all ranks go through it together.

    The part of a name before the first / is a key of LIMITS. `weights` holds the routers' buffers too.
    """
    world = start_world(config)
    config, tokenizer = settle_vocabulary(config)
    engine, loader = make_engine(config, world), data_loader(config, world, tokenizer)
    for step in range(1, min(STEPS, config.train.steps) + 1):
        result = engine.forward_backward(loader.next_step())
        yield f"loss/{step}/training", torch.tensor(result.loss)
        yield f"loss/{step}/cross entropy", torch.tensor(result.cross_entropy)
        for layer, stats in result.stats.items():
            yield f"tokens/{step}/layer {layer}", stats["tokens_per_expert"]
        for name, gradient in engine.gradients():
            yield f"gradients/{step}/{name}", whole(gradient)
        yield f"loss/{step}/gradient norm", torch.tensor(engine.step())
    for name, value in engine.model.state_dict().items():
        yield f"weights/{name}", whole(value)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which the ranks hold parts, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def record(config: Config, path: Path) -> None:
    """Write what one process computes."""
    torch.save(dict(observe(config)), path)


def compare(config: Config, path: Path) -> Found:
    """How what this rank sees of a run differs from what `record` wrote: of several copies of a tensor the worst."""
    expected = torch.load(path, mmap=True, weights_only=True)
    unit = torch.finfo({"fp32": torch.float32, "fp64": torch.float64}[config.train.dtype]).eps
    rounding = {group: unit * size for group, size in _sizes(expected).items()}
    found: Found = {}
    for name, value in observe(config):
        if name not in expected:
            apart = math.inf
        elif name.startswith("tokens/"):
            apart = miscounted(value, expected[name])
        else:
            apart = difference(value, expected[name], rounding.get(_group(name), 0.0))
        found[name] = max(found.get(name, 0.0), apart)
    return found


def _group(name: str) -> str:
    return name.rpartition("/")[0]  # a step's gradients, or all weights


def _sizes(expected: dict[str, Tensor]) -> dict[str, float]:
    """The norm of all gradients of a step, and of all weights."""
    squares: dict[str, float] = {}
    for name, value in expected.items():
        if name.startswith(("gradients/", "weights/")):
            squares[_group(name)] = squares.get(_group(name), 0.0) + float(value.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


def difference(a: Tensor, b: Tensor, rounding: float) -> float:
    """|a - b| / |b|; inf where a is of another shape or holds anything but numbers. Both are 0 where neither exceeds `rounding`."""
    if a.shape != b.shape or not a.isfinite().all():
        return math.inf
    a, b = a.double(), b.double()
    apart, size = float((a - b).norm()), float(b.norm())
    if max(size, float(a.norm())) <= rounding:
        return 0.0
    return apart / size if size else math.inf


def miscounted(a: Tensor, b: Tensor) -> float:
    """By how many tokens the most different expert's share differs."""
    return float((a - b).abs().max()) if a.shape == b.shape and a.isfinite().all() else math.inf


def combine(ranks: list[Found], path: Path) -> Found:
    """The worst that any rank found for each tensor of `path`; inf for one that no rank has, or that only ranks have."""
    names = torch.load(path, mmap=True, weights_only=True).keys() | {name for found in ranks for name in found}
    return {name: max((found[name] for found in ranks if name in found), default=math.inf) for name in sorted(names)}


class Verdict(NamedTuple):
    """One layout beside one process."""

    worst: dict[str, tuple[float, str]]  # key of LIMITS -> the largest relative difference and where it is
    failures: list[str]  # what is beyond its limit, the worst first


def judge(found: Found, dtype: str) -> Verdict:
    """Whether differences are rounding."""
    limits = LIMITS[dtype]
    worst = {kind: max((value, name) for name, value in found.items() if name.startswith(f"{kind}/")) for kind in limits}
    beyond = {name: value for name, value in found.items() if value > limits[name.partition("/")[0]]}
    return Verdict(worst, [f"{name}: {value:.1e}" for name, value in sorted(beyond.items(), key=lambda item: -item[1])])


def verify(config: Config, trials: Iterable[Trial], folder: Path) -> Iterator[tuple[Trial, Verdict]]:
    """Each trial of a prepared `config` beside one process, on ranks of this machine; `folder` is for what that process computes."""
    reference, patience = folder / "one-process.pt", float(config.parallel.timeout_seconds)
    alone = parse(merge(config.model_dump(mode="json"), {"parallel": ONE_PROCESS, **NATIVE}), "one process")
    run_ranks(1, record, alone, reference, timeout=None, patience=patience)
    for trial in trials:
        found = run_ranks(trial.ranks, compare, trial.config, reference, timeout=None, patience=patience)
        yield trial, judge(combine(found, reference), config.train.dtype)
