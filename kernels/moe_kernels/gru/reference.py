"""One step of the router's recurrence: a GRU over depth. Shapes: T tokens, P router width.

Cost per token at P=128: forward 12 P^2 = 197 kFLOP and 1,280 B (z bf16, h and h_next fp32); backward 590 kFLOP (gates
recomputed) and 6.9 kB. T=16,384 forward: 3.2 GFLOP, 21 MB: A100 10 us, H100 6 us, H200 4 us. Backward: 9.7 GFLOP, 113 MB: A100
55 us, H100 34 us, H200 24 us. All of it is bandwidth.

Saved for backward: z and h, which the layers keep anyway; the gates (2 kB per token and layer at P=128) are recomputed.
"""

import torch
from torch import Tensor

from moe_kernels.checks import FLOATS, require


def check_arguments(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
    """Raise KernelError where `gru_step` cannot take these arguments."""
    op = "gru_step"
    ok = z.ndim == 2 and h.ndim == 2 and len(z) == len(h) and z.dtype in FLOATS
    require(ok, op, "z must be floating [T, I] and h floating [T, P]", z=z, h=h)
    width = h.shape[1]
    for name, value, shape in (
        ("w_ih", w_ih, (3 * width, z.shape[1])),
        ("w_hh", w_hh, (3 * width, width)),
        ("b_ih", b_ih, (3 * width,)),
        ("b_hh", b_hh, (3 * width,)),
    ):
        rule = f"{name} must be {list(shape)} (order r, z, n) on z's device, where z is [T, I] and h is [T, P]"
        require(tuple(value.shape) == shape and value.device == z.device, op, rule, **{name: value}, z=z, h=h)
        require(value.dtype in FLOATS, op, f"{name} must be floating", **{name: value})
    state = torch.float64 if z.dtype == torch.float64 else torch.float32
    rule = "the state is never rounded: h must be float32, or float64 where z is float64, on z's device"
    require(h.dtype == state and h.device == z.device, op, rule, h=h, z=z)


def gru_step(z: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensor:
    """The next state of `torch.nn.GRUCell` with input `z` and state `h`.

    z [T, I] compute dtype (I = P in RMoE; another width in its ablation without projectors), h [T, P] fp32 (fp64 where z is
    fp64), w_ih [3P, I], w_hh [3P, P], b_ih and b_hh [3P] in GRUCell's layout and order (r, z, n) -> h_next [T, P] of h's dtype.
    Gradients to all six.

        r = sigmoid(z W_ir' + b_ir + h W_hr' + b_hr)        reset gate
        u = sigmoid(z W_iz' + b_iz + h W_hz' + b_hz)        update gate
        n = tanh(z W_in' + b_in + r o (h W_hn' + b_hn))     candidate
        h_next = (1 - u) o n + u o h

    The operands of the matrix products are rounded to z's dtype and accumulate in fp32; gates and state are fp32.
    Raises KernelError where shapes do not agree or h is not fp32 (fp64 for fp64 z).
    """
    check_arguments(z, h, w_ih, w_hh, b_ih, b_hh)
    from_input = z.to(h.dtype) @ w_ih.to(z.dtype).to(h.dtype).T + b_ih
    from_state = h.to(z.dtype).to(h.dtype) @ w_hh.to(z.dtype).to(h.dtype).T + b_hh
    ir, iu, candidate = from_input.chunk(3, -1)
    hr, hu, hn = from_state.chunk(3, -1)
    r, u = torch.sigmoid(ir + hr), torch.sigmoid(iu + hu)
    n = torch.tanh(candidate + r * hn)
    return (1 - u) * n + u * h
