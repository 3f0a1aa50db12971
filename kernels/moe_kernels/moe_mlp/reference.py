"""Naive twin of moe_mlp, in any float dtype, and its documentation.

T tokens, K choices, E experts, D hidden, F expert hidden, M = T * K slots.

Cost at the flagship shape (T = 16,384, E = 16, K = 4, D = 1,280, F = 448, bf16). Bytes: each tensor once, gathered rows K times; the
time is the larger of FLOPs over peak (312 / 989 / 989 TFLOP/s) and bytes over bandwidth (2.04 / 3.35 / 4.8 TB/s), in microseconds:

| kernel | FLOPs | bytes | A100 | H100 | H200 |
| --- | --- | --- | --- | --- | --- |
| up projection, SwiGLU | 4 MDF = 150 GFLOP | 2 (MD + 3 MF + 2 EDF) = 381 MB | 482 | 152 | 152 |
| down projection | 2 MDF = 75 GFLOP | 2 (MF + MD + EDF) = 245 MB | 241 | 76 | 76 |
| combine | 2 MD = 0.2 GFLOP | 2 (MD + TD) = 210 MB | 103 | 63 | 44 |
| dA (gradient through SwiGLU) | 2 MDF = 75 GFLOP | 2 (MD + 5 MF + EDF) = 480 MB | 241 | 143 | 100 |
| dW down | 2 MDF = 75 GFLOP | 2 (MD + MF + EDF) = 245 MB | 241 | 76 | 76 |
| dX rows | 4 MDF = 150 GFLOP | 2 (2 MF + 2 EDF + MD) = 322 MB | 482 | 152 | 152 |
| dX sum | MD = 0.1 GFLOP | 2 (MD + TD) = 210 MB | 103 | 63 | 44 |
| dW gate and up | 4 MDF = 150 GFLOP | 2 (2 MF + MD + 2 EDF) = 322 MB | 482 | 152 | 152 |
| forward + backward | 18 MDF = 676 GFLOP | 2.4 GB | 2,375 | 877 | 796 |

Saved for backward, per token: x (2D bytes), z (4 KF) and the indices (8 K), 9.8 KB here, with the arguments held anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.checks import check_moe_mlp


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts: out[t] = sum_k weights[t, k] * W_down[e] (silu(gate) * up), e = expert_ids[t, k].

    x [T, D]; w_gate_up [E, 2F, D], F gate rows and then F up rows, so that (gate, up) = W_gate_up[e] x[t]; w_down [E, D, F];
    expert_ids [T, K] int32 in [-1, E); weights [T, K] of any float dtype. Returns [T, D] in x's dtype. T = 0 and repeated experts are
    fine; an empty slot (-1) contributes exactly zero, whatever its weight, and has a zero gradient. Differentiable in x, w_gate_up,
    w_down and weights.

    Raises KernelError for shapes that do not match, mixed dtypes or devices (weights' dtype is free), a non-contiguous argument, T * K
    above 2^30, and in debug mode for an expert id out of range.
    """
    check_moe_mlp(x, w_gate_up, w_down, expert_ids, weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    terms = x.new_zeros(*expert_ids.shape, x.shape[1], dtype=wide)  # [T, K, D]
    for expert, (gate_up, down) in enumerate(zip(w_gate_up.unbind(0), w_down.unbind(0), strict=True)):
        token, k = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up.T).chunk(2, dim=-1)
        y = (F.silu(gate.to(wide)) * up.to(wide)).to(x.dtype) @ down.T
        terms = terms.index_put((token, k), y.to(wide) * weights[token, k, None].to(wide))
    total = x.new_zeros(x.shape, dtype=wide)
    for term in terms.unbind(1):
        total = total + term
    return total.to(x.dtype)
