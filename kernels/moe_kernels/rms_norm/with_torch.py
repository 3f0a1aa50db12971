"""`rms_norm` and `add_rms_norm` on any device: the input and one number per token are saved, and few passes go over memory."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels.rms_norm.reference import check_arguments


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `moe_kernels.rms_norm.reference.rms_norm`."""
    check_arguments("rms_norm", x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `moe_kernels.rms_norm.reference.add_rms_norm`."""
    check_arguments("add_rms_norm", x, weight, eps, branch)
    return _AddRmsNorm.apply(x, branch, weight, eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # vector_norm reads x once and makes no wide copy
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    rstd = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    if x.dtype == rstd.dtype:  # neither `mul_` nor `to`: compiled by torch 2.11, gradients would be wrong
        return x * rstd * weight, rstd
    return x.to(rstd.dtype).mul_(rstd).mul_(weight).to(x.dtype), rstd


def _backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (in the wide dtype, so that a caller may add to it before rounding) and of weight."""
    # Both reductions are products of one tensor, grad * x, with a vector.
    grad, wide = grad.to(rstd.dtype), weight.to(rstd.dtype)
    product = (grad * x).reshape(-1, weight.shape[0])
    dw = (rstd.reshape(-1) @ product).to(weight.dtype)
    slope = (product @ wide).view_as(rstd).mul_(rstd / weight.shape[0]).mul_(rstd.square())
    return (grad * wide).mul_(rstd).addcmul_(x.to(rstd.dtype), slope, value=-1), dw


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _backward(grad, x, weight, rstd)
        return dx.to(x.dtype), dw, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + branch
        y, rstd = _forward(total, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dw = _backward(grad, total, weight, rstd)
        dx = dx.add_(grad_total).to(total.dtype)
        return dx, dx, dw, None
