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
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([d_gate, F.silu(gate).mul_(grad)], -1).to(gate_up.dtype)
