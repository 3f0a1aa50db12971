"""`swiglu` on any device: the backward recomputes the sigmoid and writes one gradient tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.swiglu.reference import check_arguments


def swiglu(gate_up: Tensor) -> Tensor:
    """See `moe_kernels.swiglu.reference.swiglu`."""
    check_arguments(gate_up)
    return _Swiglu.apply(gate_up)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(_wide(gate)).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _wide(gate_up).chunk(2, -1)
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        d_gate, d_up = out.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_up.copy_(silu * grad)
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        d_gate.copy_(slope.mul_(up).mul_(grad))
        return out
