"""`gru_step` on any device, with a hand-written backward that saves z and h and recomputes the gates.

Autograd would keep r, u, n and the hidden half of n: 2 kB more per token and layer at P=128 (805 MB for 16,384 tokens and 24
layers). Recomputing them costs two products beside the other six.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.gru.reference import check_arguments
from moe_kernels.products import matmul


def gru_step(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """See `moe_kernels.gru.reference.gru_step`."""
    check_arguments(z, h, w_ih, w_hh, b_ih, b_hh)
    return _GruStep.apply(z, h, w_ih, w_hh, b_ih, b_hh)


def _gates(
    z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, u, n and the hidden half of n, each [T, P] in h's dtype."""
    low = z.dtype
    from_input = matmul(z, w_ih.to(low).t(), h.dtype).add_(b_ih)
    from_state = matmul(h.to(low), w_hh.to(low).t(), h.dtype).add_(b_hh)
    width = h.shape[1]
    both = from_input[:, : 2 * width].add_(from_state[:, : 2 * width]).sigmoid_()
    r, u = both[:, :width], both[:, width:]
    hidden = from_state[:, 2 * width :]
    n = from_input[:, 2 * width :].addcmul_(r, hidden).tanh_()
    return r, u, n, hidden


class _GruStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        ctx.save_for_backward(z, h, w_ih, w_hh, b_ih, b_hh)
        _, u, n, _ = _gates(z, h, w_ih, w_hh, b_ih, b_hh)
        return torch.lerp(n, h, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the pre-activations first (order r, u, n; for the hidden side r, u, hidden half of n), then four
        products."""
        z, h, w_ih, w_hh, b_ih, b_hh = ctx.saved_tensors
        low = z.dtype
        r, u, n, hidden = _gates(z, h, w_ih, w_hh, b_ih, b_hh)
        dn = grad * (1 - u) * (1 - n * n)
        du = grad * (h - n) * u * (1 - u)
        dr = dn * hidden * r * (1 - r)
        d_input = torch.cat([dr, du, dn], -1)
        d_state = torch.cat([dr, du, dn * r], -1)
        low_input, low_state = d_input.to(low), d_state.to(low)
        need = ctx.needs_input_grad
        dz = matmul(low_input, w_ih.to(low), h.dtype).to(low) if need[0] else None
        dh = matmul(low_state, w_hh.to(low), h.dtype).addcmul_(grad, u) if need[1] else None
        dw_ih = matmul(low_input.t(), z, h.dtype).to(w_ih.dtype) if need[2] else None
        dw_hh = matmul(low_state.t(), h.to(low), h.dtype).to(w_hh.dtype) if need[3] else None
        db_ih = d_input.sum(0).to(b_ih.dtype) if need[4] else None
        db_hh = d_state.sum(0).to(b_hh.dtype) if need[5] else None
        return dz, dh, dw_ih, dw_hh, db_ih, db_hh
