"""The router's step and the rest of a layer: norms, rotary positions, SwiGLU and the loss, beside plain torch and Liger."""

import torch
import torch.nn.functional as F
from harness import FORWARD, TRAINING
from op_jobs import Draw, Inputs, Op, Outputs, Sizes
from torch import Tensor

from moe_kernels import Backend

EPS = 1e-6
_ROUTER_BACKWARD = 3  # products of forward and backward together over those of forward


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
