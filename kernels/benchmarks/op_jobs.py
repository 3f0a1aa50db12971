"""What the harness measures of one op: sizes, random inputs, the ways to call it, and the job that compares them.

T tokens, D hidden, P router width, E experts, K choices, H heads, d head width, F MLP hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import FORWARD, TRAINING, Job, Problem, Provider, Runner
from moe_ops import own_provider
from rivals import describe_version, why_not_importable
from torch import Tensor

from moe_kernels import Backend, get_backend

PARAMETERS = ("projector", "w_ih", "w_hh", "b_ih", "b_hh", "scorer", "weight", "w")  # the other leaves are activations
CLEAR_GAP = 0.1  # between logits: tokens whose ranking a rounding could change get no gradient through their choice
Inputs = dict[str, Any]  # tensors, and what an op takes besides
Outputs = tuple[Tensor, ...]
Forward = Callable[[Inputs], Outputs]


class Sizes(NamedTuple):
    """One size of everything."""

    name: str
    T: int
    D: int
    P: int
    E: int
    K: int
    H: int
    F: int
    V: int

    @property
    def d(self) -> int:
        """Head width."""
        return self.D // self.H


SIZES = (
    Sizes("flagship", T=16_384, D=1280, P=128, E=16, K=4, H=20, F=1792, V=96_512),
    Sizes("tiny", T=64, D=32, P=8, E=8, K=2, H=4, F=24, V=300),
)


class Draw:
    """Random inputs of one dtype from one generator."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Values that the compute dtype holds, in `dtype`."""
        values = torch.randn(*size, generator=self.generator, device=self.device) * scale
        return values.to(self.dtype).to(dtype or self.dtype)

    def integers(self, high: int, *size: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, size, generator=self.generator, device=self.device)


class Op(NamedTuple):
    """How one op is set up and called. The ways to call it take the inputs by name and return the differentiable outputs."""

    name: str
    sizes: tuple[str, ...]  # which of Sizes' fields its rows show
    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    draw: Callable[[Sizes, Draw], Inputs]
    ours: Callable[[Backend, Inputs], Outputs]
    eager: Forward | None = None
    liger: tuple[str, Forward] | None = None  # the module it imports, and the call
    flops: Callable[[Sizes], dict[str, float]] = lambda sizes: {}
    elements: Callable[[Sizes], dict[str, float]] = lambda sizes: {}  # moved at least, of the compute dtype
    passes: tuple[str, ...] = (FORWARD, TRAINING)
    expected: Callable[[Inputs], dict[str, Tensor]] | None = None  # where the naive twin takes too much memory


def _copy(inputs: Inputs) -> Inputs:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _exact(inputs: Inputs) -> Inputs:
    """The same values in fp32."""
    return {name: value.float() if _floating(value) else value for name, value in inputs.items()}


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradient_names(op: Op) -> tuple[str, ...]:
    return tuple(f"d{name}" for name in op.leaves)


def make_runner(op: Op, inputs: Inputs, upstream: Outputs, forward: Forward) -> Runner:
    """One way to call an op, on inputs of its own: a rival may work in place."""
    own = _copy(inputs)
    leaves = tuple(own[name].requires_grad_() for name in op.leaves)
    own_upstream = tuple(value.clone() for value in upstream)

    def restore() -> None:
        with torch.no_grad():
            for name in op.leaves:
                own[name].copy_(inputs[name])
            for mine, original in zip(own_upstream, upstream, strict=True):
                mine.copy_(original)

    return Runner(
        forward=lambda: forward(own),
        leaves=leaves,
        upstream=own_upstream,
        name_results=lambda outputs, grads: dict(
            zip((*op.outputs, *_gradient_names(op)), (value.clone() for value in (*outputs, *grads)), strict=True)
        ),
        parameters=tuple(own[name] for name in op.leaves if name in PARAMETERS),
        restore=restore,
    )


def make_upstream(op: Op, outputs: Outputs, top_k: int | None, dtype: torch.dtype) -> Outputs:
    """Random gradients of the outputs; of a scalar loss, one. Where a choice of experts is close, none through its weights."""
    if outputs[0].dim() == 0:
        return (torch.ones_like(outputs[0]),)
    draw = Draw(dtype, outputs[0].device)
    upstream = [draw.normal(*value.shape).to(value.dtype) for value in outputs]
    if top_k is not None:
        ranked = outputs[1].detach().log().sort(1, descending=True).values[:, : top_k + 1]
        clear = (-ranked.diff(dim=1)).amin(1) > CLEAR_GAP
        upstream[0] = upstream[0] * clear[:, None]
    return tuple(upstream)


def build(op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem and its expected results in fp32. Its inputs hold the upstream gradients as `upstream 0` and so on."""
    inputs = op.draw(sizes, Draw(dtype, device))
    exact = _exact(inputs)
    forward = partial(op.ours, get_backend("reference", device))
    if op.expected is None:
        upstream = make_upstream(op, tuple(value.detach() for value in forward(exact)), inputs.get("top_k"), dtype)
        runner = make_runner(op, exact, upstream, forward)
        expected = {name: value.detach() for name, value in runner.name_results(*runner.train()).items()}
    else:
        expected = op.expected(exact)
        upstream = (torch.ones((), device=device),)
    return Problem(
        op=op.name,
        shape=sizes.name,
        sizes={name: getattr(sizes, name) for name in op.sizes},
        routing=None,
        dtype=dtype,
        inputs=inputs | {f"upstream {i}": value for i, value in enumerate(upstream)},
        expected=expected,
        flops=op.flops(sizes),
        traffic={which: count * dtype.itemsize for which, count in op.elements(sizes).items()},
        passes=op.passes,
    )


def prepare(op: Op, forward: Forward, problem: Problem) -> Runner:
    """A runner for one way to call the op. Upstream gradients get the dtype that this way's outputs have."""
    inputs = {name: value for name, value in problem.inputs.items() if not name.startswith("upstream ")}
    exact = [value for name, value in problem.inputs.items() if name.startswith("upstream ")]
    with torch.no_grad():
        dtypes = [value.dtype for value in forward(_copy(inputs))]
    return make_runner(op, inputs, tuple(value.to(dtype) for value, dtype in zip(exact, dtypes, strict=True)), forward)


def _provider(op: Op, name: str, forward: Forward) -> Provider:
    return Provider(name, lambda: f"torch {torch.__version__}", lambda: None, partial(prepare, op, forward))


def _liger(op: Op, module: str, forward: Forward, device: torch.device) -> Provider:
    def why_unavailable() -> str | None:
        return "needs a CUDA device, not cpu" if device.type != "cuda" else why_not_importable((module,))

    return Provider(
        "liger", lambda: describe_version("liger_kernel", "liger_kernel"), why_unavailable, partial(prepare, op, forward)
    )


def _compiled(op: Op, device: torch.device) -> Provider:
    """Our torch backend through torch.compile."""
    kernels = get_backend("torch", device)

    @torch.compile(dynamic=False)
    def call(inputs: Inputs) -> Outputs:
        return op.ours(kernels, inputs)

    return _provider(op, "compile", call)


def jobs(
    ops: Sequence[Op], sizes: Sizes, extras: Sequence[str], backends: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Job]:
    """Every op with our backends, plain torch (`eager`) and those of `extras` (`liger`, `compile`) that have it."""
    return [
        Job(
            op.name,
            f"{op.name} {sizes.name}",
            partial(build, op, sizes, dtype, device),
            _providers(op, extras, backends, device),
        )
        for op in ops
    ]


def _providers(op: Op, extras: Sequence[str], backends: Sequence[str], device: torch.device) -> list[Provider]:
    def prepare_ours(backend: Backend, problem: Problem) -> Runner:
        return prepare(op, partial(op.ours, backend), problem)

    providers = [own_provider(name, device, prepare_ours) for name in backends]
    if op.eager is not None:
        providers.append(_provider(op, "eager", op.eager))
    if op.liger is not None and "liger" in extras:
        providers.append(_liger(op, *op.liger, device))
    if op.eager is None and "compile" in extras:
        providers.append(_compiled(op, device))
    return providers
