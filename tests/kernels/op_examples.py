"""Calls of every op of moe_kernels at any sizes: the public ones, and each custom op below them.

On real tensors, on meta tensors, or under FakeTensorMode on fake ones.
"""

import importlib
from functools import partial
from typing import NamedTuple

import torch

from moe_kernels import get_backend
from moe_kernels.aot import MODULES


class Sizes(NamedTuple):
    """T tokens, E experts, K choices, D hidden, F expert hidden, P router width, V vocabulary, H heads of width d."""

    T: int
    E: int
    K: int
    D: int
    F: int
    P: int
    V: int
    H: int
    d: int


SMALL = Sizes(12, 3, 2, 16, 8, 16, 40, 3, 8)
FLAGSHIP = Sizes(16_384, 16, 4, 1280, 448, 128, 96_512, 20, 64)
_FEW = 8  # of the tokens whose logits over the vocabulary exist at a time


def names(backend):
    """The custom ops of a backend, without their namespace."""
    for folder in MODULES:
        importlib.import_module(f"moe_kernels.{folder}.with_{backend}")
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted({op for space, _, op in registered if space == "moe_kernels" and op.rstrip("_").endswith(f"_{backend}")})


@torch.no_grad()
def arguments(backend, sizes, dtype, device, learn=False):
    """Name of an op -> the argument tuples to try. `learn`: what an op differentiates by requires a gradient."""
    s = sizes
    normal = partial(torch.randn, device=device, dtype=dtype)
    wide = partial(torch.randn, device=device, dtype=torch.float32)

    def leaves(*tensors):
        return tuple(tensor.detach().requires_grad_(learn) for tensor in tensors)

    op = lambda name: getattr(torch.ops.moe_kernels, f"{name}_{backend}")  # noqa: E731
    ids = torch.randint(0, s.E, (s.T, s.K), device=device, dtype=torch.int32)
    weights, x, grad = wide(s.T, s.K), normal(s.T, s.D), normal(s.T, s.D)
    gate_up, down = normal(s.E, 2 * s.F, s.D), normal(s.E, s.D, s.F)
    plan = get_backend(backend, device).sort_by_expert(ids, s.E)
    index, tiles = plan[:3], plan.tiles or (None, None, None, 0)
    rows = op("permute")(x, *index)
    y, z, *_ = op("moe_mlp")(x, gate_up, down, ids, weights)
    found = {
        "permute": [(*leaves(x), *index)],
        "unpermute": [(*leaves(rows), *index, *leaves(weights)), (*leaves(rows), *index, None)],
        "unpermute_backward": [(grad, rows, *index, weights)],
        "grouped_mm": [(*leaves(rows, gate_up), plan.offsets, *tiles), (*leaves(rows, gate_up), plan.offsets, None, None, None, 0)],
        "grouped_mm_backward": [(normal(s.T * s.K, 2 * s.F), rows, gate_up, plan.offsets, *tiles)],
        "moe_mlp": [(*leaves(x, gate_up, down), ids, *leaves(weights))],
        "moe_mlp_backward": [(torch.ones_like(y), x, gate_up, down, weights, z, *index)],
    }  # fmt: skip
    if backend == "triton":
        found |= _layer(s, normal, wide, leaves, op) | {"sort_by_expert": [(ids, s.E, plan.tiles.block_rows)]}
    return {name.removesuffix("_") + f"_{backend}" + "_" * name.endswith("_"): calls for name, calls in found.items()}


def _layer(s, normal, wide, leaves, op):
    """The router, the norms and the loss, of which the torch backend has no custom ops."""
    hidden, scorer, gate = normal(s.T, s.P), wide(s.E, s.P), wide(s.E, s.D)
    weights, ids, scores, _, logits = op("score_topk")(hidden, scorer, s.K, False, True)
    h, grad = wide(s.T, s.P), wide(s.T, s.P)
    cell = (wide(3 * s.P, s.P), wide(3 * s.P, s.P), wide(3 * s.P), wide(3 * s.P))
    x, branch, norm = normal(s.T, s.D), normal(s.T, s.D), wide(s.D)
    table, heads, gate_up = wide(1, s.T, s.d // 2), normal(1, s.T, s.H, s.d), normal(s.T, 2 * s.F)
    few = min(_FEW, s.T)
    row = torch.arange(few, device=x.device) - 1
    vocabulary, log_sum, coef = normal(few, s.V), wide(few), wide(few)
    flags = [(sigmoid, renormalize) for sigmoid in (False, True) for renormalize in (False, True)]
    return {
        "score_topk": [(*leaves(hidden, scorer), s.K, *flag) for flag in flags]
        + [(*leaves(x, gate), s.K, False, True)],
        "score_topk_logits": [
            (scores, weights, ids, weights, dscores, dlogits, *flag, hidden.dtype)
            for flag in flags
            for dscores in (scores, None)
            for dlogits in (logits, None)
        ],
        "score_topk_weight": [(normal(s.T, s.E), hidden), (normal(s.T, s.E), x)],
        "gru_step": [leaves(hidden, h, *cell)],
        "gru_step_backward": [(hidden, h, *cell, grad)],
        "gru_step_weights": [(normal(s.T, 4 * s.P), hidden, h)],
        "rms_norm": [(*leaves(x, norm), 1e-6)],
        "add_rms_norm": [(*leaves(x, branch, norm), 1e-6)],
        "rms_norm_backward": [(x, norm, wide(s.T).abs(), branch, extra) for extra in (None, x)],
        "rope": [(*leaves(heads), table, table, sign) for sign in (1, -1)],
        "swiglu": [leaves(gate_up)],
        "swiglu_backward": [(gate_up, normal(s.T, s.F))],
        "cross_entropy_stats": [(vocabulary, row)],
        "cross_entropy_grad_": [(vocabulary, row, log_sum, coef)],
    }  # fmt: skip


def public_calls(ops, sizes, device):
    """Name -> (float tensors to differentiate by, function of them that returns a tuple of outputs), for all ops of a backend."""
    s = sizes
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    wide = partial(torch.randn, device=device)
    ids = torch.arange(s.T * s.K, device=device).remainder(s.E).int().view(s.T, s.K)
    target, coef = torch.arange(s.T, device=device).remainder(s.V), torch.ones(s.T, device=device)
    table = torch.ones(1, s.T, s.d // 2, device=device)
    cell = [wide(3 * s.P, s.P), wide(3 * s.P, s.P), wide(3 * s.P), wide(3 * s.P)]
    experts = [normal(s.E, 2 * s.F, s.D), normal(s.E, s.D, s.F)]

    def permuted(x, weights):
        plan = ops.sort_by_expert(ids, s.E)
        return (ops.unpermute(ops.permute(x, plan), plan, weights),)

    def scored(hidden, weight):
        choice = ops.score_topk(hidden, weight, s.K)
        return choice.weights, choice.scores, choice.logits

    return {
        "permute": ([normal(s.T, s.D), wide(s.T, s.K)], permuted),
        "grouped_mm": (
            [normal(s.T * s.K, s.D), experts[0]],
            lambda rows, w: (ops.grouped_mm(rows, w, ops.sort_by_expert(ids, s.E)),),
        ),
        "moe_mlp": (
            [normal(s.T, s.D), *experts, wide(s.T, s.K)],
            lambda x, gate_up, down, weights: (ops.moe_mlp(x, gate_up, down, ids, weights),),
        ),
        "score_topk": ([normal(s.T, s.P), wide(s.E, s.P)], scored),
        "gru_step": ([normal(s.T, s.P), wide(s.T, s.P), *cell], lambda *leaves: (ops.gru_step(*leaves),)),
        "rms_norm": ([normal(s.T, s.D), wide(s.D)], lambda x, w: (ops.rms_norm(x, w, 1e-6),)),
        "add_rms_norm": (
            [normal(s.T, s.D), normal(s.T, s.D), wide(s.D)],
            lambda x, branch, w: ops.add_rms_norm(x, branch, w, 1e-6),
        ),
        "rope": ([normal(1, s.T, s.H, s.d)], lambda x: (ops.rope(x, table, table),)),
        "swiglu": ([normal(s.T, 2 * s.F)], lambda x: (ops.swiglu(x),)),
        "linear_cross_entropy": (
            [normal(s.T, s.D), normal(s.V, s.D)],
            lambda x, w: ops.linear_cross_entropy(x, w, target, coef)[:1],
        ),
    }


def outputs_and_gradients(call, leaves):
    """Of a public call; the gradient of each output is ones."""
    outputs = call(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])]
