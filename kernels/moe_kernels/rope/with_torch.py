"""`rope` on any device: no copy of x is saved, since the backward is the opposite rotation."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.rope.reference import check_arguments


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `moe_kernels.rope.reference.rope`."""
    check_arguments(x, cos, sin)
    return _Rope.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    halves = x.unflatten(-1, (2, x.shape[-1] // 2)).to(wide)
    out = halves * cos.unsqueeze(3)
    out[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-sign)
    out[..., 1, :].addcmul_(halves[..., 0, :], sin, value=sign)
    return out.flatten(-2).to(x.dtype).contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None
