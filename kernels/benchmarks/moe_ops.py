"""The expert MLP at the shapes and routings of the benchmark, with the reference every provider is compared with.

T tokens, E experts, K choices, D hidden, F expert hidden.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from harness import FORWARD, TRAINING, Job, Problem, Provider, Runner
from rivals import Rival
from torch import Tensor

from moe_kernels import Backend, KernelError, get_backend

OP = "moe_mlp"
ROUTINGS = ("balanced", "zipf0.8")
GRADIENTS = ("dx", "dw_gate_up", "dw_down", "dweights")


class Shape(NamedTuple):
    """One size of the problem."""

    name: str
    T: int
    E: int
    K: int
    D: int
    F: int


SHAPES = (  # 16k first: rivals that tune do so at the first token count of a width they meet
    Shape("flagship-16k", 16_384, 16, 4, 1280, 448),
    Shape("flagship-4k", 4_096, 16, 4, 1280, 448),
    Shape("flagship-64k", 65_536, 16, 4, 1280, 448),
    Shape("fine-grained", 16_384, 128, 8, 2048, 768),
    Shape("mixtral", 4_096, 8, 2, 4096, 14_336),
    Shape("e256", 16_384, 256, 8, 2048, 512),
    Shape("tiny", 48, 4, 2, 32, 16),  # to try the harness on a CPU
)


def route(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """Distinct experts for each token, [T, K] int32: drawn uniformly, or with popularity rank^-0.8 in a random order of experts."""
    device = generator.device
    log_popularity = torch.zeros(shape.E, device=device)
    if routing != "balanced":
        rank = torch.randperm(shape.E, generator=generator, device=device) + 1
        log_popularity = -float(routing.removeprefix("zipf")) * rank.log()
    # the K largest of log p plus Gumbel noise are K draws without replacement
    noise = torch.rand(shape.T, shape.E, generator=generator, device=device).clamp_min(1e-20).log().neg().log().neg()
    return (log_popularity + noise).topk(shape.K, dim=1).indices.int().contiguous()


def flops(expert_ids: Tensor, hidden: int, ffn: int) -> dict[str, float]:
    """Useful arithmetic: that of the slots that are routed, without what a provider pads or computes again."""
    slots = int((expert_ids >= 0).sum())
    return {FORWARD: 6.0 * slots * hidden * ffn, TRAINING: 18.0 * slots * hidden * ffn}


def make_inputs(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random values. The routing weights are fp32 numbers that `dtype` holds too: providers differ in the dtype they want."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    weights = torch.rand(shape.T, shape.K, generator=generator, device=device) + 0.1
    return {
        "x": normal(shape.T, shape.D),
        "w_gate_up": normal(shape.E, 2 * shape.F, shape.D, scale=shape.D**-0.5),
        "w_down": normal(shape.E, shape.D, shape.F, scale=shape.F**-0.5),
        "expert_ids": route(shape, routing, generator),
        "weights": (weights / weights.sum(1, keepdim=True)).to(dtype).float(),
        "grad": normal(shape.T, shape.D),
    }


def build(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem and its expected results, from the naive twin in fp32."""
    inputs = make_inputs(shape, routing, dtype, device)
    exact = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    runner = own_runner(get_backend("reference", device), exact)
    load = torch.bincount(inputs["expert_ids"].flatten(), minlength=shape.E).max().item() / (shape.T * shape.K / shape.E)
    return Problem(
        op=OP,
        shape=shape.name,
        sizes={name: value for name, value in shape._asdict().items() if name != "name"},
        routing=routing,
        dtype=dtype,
        inputs=inputs,
        expected={name: value.detach() for name, value in runner.name_results(*runner.train()).items()},
        flops=flops(inputs["expert_ids"], shape.D, shape.F),
        facts={"largest_load": load},  # rows of the fullest expert over the mean
    )


def own_runner(backend: Backend, inputs: dict[str, Tensor]) -> Runner:
    """One of our backends."""
    names = ("x", "w_gate_up", "w_down", "weights")
    x, w_gate_up, w_down, weights = leaves = tuple(inputs[name].detach().requires_grad_() for name in names)
    return Runner(
        forward=lambda: (backend.moe_mlp(x, w_gate_up, w_down, inputs["expert_ids"], weights),),
        leaves=leaves,
        upstream=(inputs["grad"],),
        name_results=lambda outputs, grads: {"out": outputs[0], **dict(zip(GRADIENTS, grads, strict=True))},
        parameters=(w_gate_up, w_down),
    )


def rival_runner(rival: Rival, problem: Problem) -> Runner:
    """A rival, with its gradients in our layouts."""
    inputs = problem.inputs
    call = rival.make(inputs["x"], inputs["w_gate_up"], inputs["w_down"], inputs["expert_ids"], inputs["weights"])
    return Runner(
        forward=lambda: (call.forward(),),
        leaves=call.leaves,
        upstream=(inputs["grad"],),
        name_results=lambda outputs, grads: {"out": outputs[0], **dict(zip(GRADIENTS, call.to_ours(grads), strict=True))},
        parameters=call.leaves[1:-1],
        note=call.note,
    )


def own_provider(name: str, device: torch.device, prepare: Callable[[Backend, Problem], Runner]) -> Provider:
    """A provider from one of our backends."""

    def why_unavailable() -> str | None:
        try:
            get_backend(name, device)
        except KernelError as error:
            return str(error)
        return None

    return Provider(name, lambda: "this commit", why_unavailable, lambda problem: prepare(get_backend(name, device), problem))


def jobs(
    shapes: Sequence[Shape],
    routings: Sequence[str],
    rivals: Sequence[Rival],
    backends: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Job]:
    """Every shape with every routing."""
    providers = [own_provider(name, device, lambda backend, problem: own_runner(backend, problem.inputs)) for name in backends]
    providers += [
        Provider(rival.name, rival.version, partial(rival.why_unavailable, device), partial(rival_runner, rival))
        for rival in rivals
    ]
    return [
        Job(OP, f"{shape.name} {routing}", partial(build, shape, routing, dtype, device), providers)
        for shape in shapes
        for routing in routings
    ]
