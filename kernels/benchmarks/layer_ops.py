"""The router's step and the rest of a layer: norms, rotary positions, SwiGLU and the loss, beside plain torch and Liger.

T tokens, D hidden, P router width, E experts, K choices, H heads, d head width, F MLP hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import FORWARD, TRAINING, Job, Problem, Provider, Runner
from moe_ops import own_provider
from rivals import describe_version, why_not_importable
from torch import Tensor

from moe_kernels import Backend, get_backend

EPS = 1e-6
PARAMETERS = ("projector", "w_ih", "w_hh", "b_ih", "b_hh", "scorer", "weight", "w")  # the other leaves are activations
CLEAR_GAP = 0.1  # between logits: tokens whose ranking a rounding could change get no gradient through their choice
Inputs = dict[str, Any]  # tensors, and what an op takes besides
Outputs = tuple[Tensor, ...]
Forward = Callable[[Inputs], Outputs]
_ROUTER_BACKWARD = 3  # products of forward and backward together over those of forward


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


def _draw_recurrent(sizes: Sizes, draw: Draw) -> Inputs:
    state = torch.float32
    return {
        "x": draw.normal(sizes.T, sizes.D),
        "h": draw.normal(sizes.T, sizes.P, scale=0.5, dtype=state),
        "projector": draw.normal(sizes.P, sizes.D, scale=sizes.D**-0.5),
        "w_ih": draw.normal(3 * sizes.P, sizes.P, scale=sizes.P**-0.5),
        "w_hh": draw.normal(3 * sizes.P, sizes.P, scale=sizes.P**-0.5),
        "b_ih": draw.normal(3 * sizes.P, scale=0.1),
        "b_hh": draw.normal(3 * sizes.P, scale=0.1),
        "scorer": draw.normal(sizes.E, sizes.P, scale=2 * sizes.P**-0.5),
        "top_k": sizes.K,
    }


def recurrent_step(kernels: Backend, inputs: Inputs) -> Outputs:
    """Projector, GRU step, scorer and top-k, as the recurrent router calls them."""
    x = inputs["x"]
    h = kernels.gru_step(F.linear(x, inputs["projector"]), *(inputs[name] for name in ("h", "w_ih", "w_hh", "b_ih", "b_hh")))
    choice = kernels.score_topk(h.to(x.dtype), inputs["scorer"], inputs["top_k"])
    return choice.weights, choice.scores, h


def linear_gate(kernels: Backend, inputs: Inputs) -> Outputs:
    """The usual router: logits straight from the hidden rows, and top-k."""
    choice = kernels.score_topk(inputs["x"], inputs["scorer"], inputs["top_k"])
    return choice.weights, choice.scores


def _draw_gate(sizes: Sizes, draw: Draw) -> Inputs:
    x, scorer = draw.normal(sizes.T, sizes.D), draw.normal(sizes.E, sizes.D, scale=sizes.D**-0.5)
    return {"x": x, "scorer": scorer, "top_k": sizes.K}


def _rope_eager(inputs: Inputs) -> Outputs:
    """As Hugging Face models write it: tables of the whole head width, in the compute dtype."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        tables = (torch.cat([inputs[name]] * 2, -1).to(x.dtype).unsqueeze(2) for name in ("cos", "sin"))
        cos, sin = tables
        return x * cos + torch.cat([-second, first], -1) * sin

    return rotate(inputs["q"]), rotate(inputs["k"])


def _rope_liger(inputs: Inputs) -> Outputs:
    """Works in place on q and k, and on their gradients."""
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat([inputs[name]] * 2, -1) for name in ("cos", "sin"))
    q, k = LigerRopeFunction.apply(inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _draw_rope(sizes: Sizes, draw: Draw) -> Inputs:
    q, k = (draw.normal(1, sizes.T, sizes.H, sizes.d) for _ in range(2))
    half = torch.arange(sizes.d // 2, device=draw.device)
    angles = torch.arange(sizes.T, device=draw.device)[:, None] * 10_000.0 ** (-half / (sizes.d // 2))
    return {"q": q, "k": k, "cos": angles.cos()[None], "sin": angles.sin()[None]}


def _rms_norm_liger(inputs: Inputs) -> Outputs:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return (LigerRMSNormFunction.apply(inputs["x"], inputs["weight"], EPS, 0.0, "llama", False),)


def _add_rms_norm_eager(inputs: Inputs) -> Outputs:
    total = inputs["x"] + inputs["branch"]
    return total, F.rms_norm(total, total.shape[-1:], inputs["weight"], EPS)


def _add_rms_norm_liger(inputs: Inputs) -> Outputs:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    normed, total = LigerFusedAddRMSNormFunction.apply(inputs["x"], inputs["branch"], inputs["weight"], EPS)
    return total, normed


def _swiglu_eager(inputs: Inputs) -> Outputs:
    gate, up = inputs["gate_up"].chunk(2, -1)
    return (F.silu(gate) * up,)


def _swiglu_liger(inputs: Inputs) -> Outputs:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return (LigerFusedGateUpSiLUMulFunction.apply(inputs["gate_up"]),)


def _draw_loss(sizes: Sizes, draw: Draw) -> Inputs:
    return {
        "x": draw.normal(sizes.T, sizes.D),
        "w": draw.normal(sizes.V, sizes.D, scale=sizes.D**-0.5),
        "target": draw.integers(sizes.V, sizes.T),
        "coef": torch.full((sizes.T,), 1 / sizes.T, device=draw.device),
    }


def _loss_eager(inputs: Inputs) -> Outputs:
    return (F.cross_entropy(F.linear(inputs["x"], inputs["w"]).float(), inputs["target"]),)


def _loss_liger(inputs: Inputs) -> Outputs:
    """With its weight gradient added up in fp32, as ours is."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    plain = (
        None,
        None,
        -100,
        0.0,
        0.0,
        "mean",
        None,
        False,
    )  # bias, ce_weight, ignore_index, z, smoothing, reduction, softcap, z
    result = LigerFusedLinearCrossEntropyFunction.apply(inputs["x"], inputs["w"], inputs["target"], *plain, torch.float32)
    return (result[0],)


def expected_loss(inputs: Inputs, chunk: int = 2048) -> dict[str, Tensor]:
    """The loss and its gradients in fp32, some tokens at a time."""
    x, w = inputs["x"].float(), inputs["w"].float().requires_grad_()
    loss, dw, dx = torch.zeros((), device=x.device), torch.zeros_like(w), torch.empty_like(x)
    for start in range(0, x.shape[0], chunk):
        part = x[start : start + chunk].detach().requires_grad_()
        share = F.cross_entropy(part @ w.T, inputs["target"][start : start + chunk], reduction="sum") / x.shape[0]
        dx[start : start + chunk], more = torch.autograd.grad(share, (part, w))
        dw += more
        loss += share.detach()
    return {"loss": loss, "dx": dx, "dw": dw}


def _both(once: float, forward: float, backward: float) -> dict[str, float]:
    """Elements moved in forward, and in forward and backward, in units of `once`."""
    return {FORWARD: once * forward, TRAINING: once * (forward + backward)}


def _products(forward: float) -> dict[str, float]:
    return {FORWARD: forward, TRAINING: _ROUTER_BACKWARD * forward}


def _recurrent_elements(sizes: Sizes) -> dict[str, float]:
    """fp32 tensors (the state, scores, weights, ids) count as two elements of 16 bits each."""
    outputs = 2 * sizes.P + 2 * sizes.E + 4 * sizes.K
    forward = sizes.D + 2 * sizes.P + outputs
    backward = 2 * sizes.D + 2 * 2 * sizes.P + outputs
    return {FORWARD: sizes.T * forward, TRAINING: sizes.T * (forward + backward)}


ROUTER_OPS = (
    Op(
        "recurrent_step",
        ("T", "D", "P", "E", "K"),
        ("x", "h", "projector", "w_ih", "w_hh", "b_ih", "b_hh", "scorer"),
        ("weights", "scores", "h_next"),
        _draw_recurrent,
        ours=recurrent_step,
        flops=lambda s: _products(2.0 * s.T * (s.D * s.P + 6 * s.P * s.P + s.P * s.E)),
        elements=_recurrent_elements,
    ),
    Op(
        "linear_gate",
        ("T", "D", "E", "K"),
        ("x", "scorer"),
        ("weights", "scores"),
        _draw_gate,
        ours=linear_gate,
        flops=lambda s: _products(2.0 * s.T * s.D * s.E),
        elements=lambda s: {FORWARD: s.T * (s.D + 2 * s.E + 4 * s.K), TRAINING: s.T * (3 * s.D + 2 * (2 * s.E + 4 * s.K))},
    ),
)

LAYER_OPS = (
    Op(
        "rms_norm",
        ("T", "D"),
        ("x", "weight"),
        ("out",),
        lambda s, draw: {"x": draw.normal(s.T, s.D), "weight": draw.normal(s.D)},
        ours=lambda kernels, i: (kernels.rms_norm(i["x"], i["weight"], EPS),),
        eager=lambda i: (F.rms_norm(i["x"], i["x"].shape[-1:], i["weight"], EPS),),
        liger=("liger_kernel.ops.rms_norm", _rms_norm_liger),
        elements=lambda s: _both(s.T * s.D, 2, 3),
    ),
    Op(
        "add_rms_norm",
        ("T", "D"),
        ("x", "branch", "weight"),
        ("total", "out"),
        lambda s, draw: {"x": draw.normal(s.T, s.D), "branch": draw.normal(s.T, s.D), "weight": draw.normal(s.D)},
        ours=lambda kernels, i: kernels.add_rms_norm(i["x"], i["branch"], i["weight"], EPS),
        eager=_add_rms_norm_eager,
        liger=("liger_kernel.ops.fused_add_rms_norm", _add_rms_norm_liger),
        elements=lambda s: _both(s.T * s.D, 4, 4),
    ),
    Op(
        "rope",
        ("T", "H", "d"),
        ("q", "k"),
        ("q_out", "k_out"),
        _draw_rope,
        ours=lambda kernels, i: (kernels.rope(i["q"], i["cos"], i["sin"]), kernels.rope(i["k"], i["cos"], i["sin"])),
        eager=_rope_eager,
        liger=("liger_kernel.ops.rope", _rope_liger),
        elements=lambda s: _both(2 * s.T * s.H * s.d, 2, 2),
    ),
    Op(
        "swiglu",
        ("T", "F"),
        ("gate_up",),
        ("out",),
        lambda s, draw: {"gate_up": draw.normal(s.T, 2 * s.F)},
        ours=lambda kernels, i: (kernels.swiglu(i["gate_up"]),),
        eager=_swiglu_eager,
        liger=("liger_kernel.ops.swiglu", _swiglu_liger),
        elements=lambda s: _both(s.T * s.F, 3, 5),
    ),
    Op(
        "linear_cross_entropy",
        ("T", "D", "V"),
        ("x", "w"),
        ("loss",),
        _draw_loss,
        ours=lambda kernels, i: kernels.linear_cross_entropy(i["x"], i["w"], i["target"], i["coef"])[:1],
        eager=_loss_eager,
        liger=("liger_kernel.ops.fused_linear_cross_entropy", _loss_liger),
        flops=lambda s: {TRAINING: 6.0 * s.T * s.V * s.D},
        passes=(TRAINING,),  # the gradient is computed in forward, so forward alone compares with nothing
        expected=expected_loss,
    ),
)


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
