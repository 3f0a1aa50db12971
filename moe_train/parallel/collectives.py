"""Collectives with gradients. Each one's gradient is the collective that moves gradients back to where the values came from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# torch 2.13 renamed them; 2.11 has the old names only.
_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of x over the ranks, on all of them; each rank's x gets the sum of all ranks' gradients."""
    return _AllReduce.apply(x, group) if group.size() > 1 else x


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """x of all ranks behind each other along `dim`; gradients are summed over ranks and scattered."""
    return _AllGather.apply(x, dim, group) if group.size() > 1 else x


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of the sum of x over the ranks; gradients are gathered."""
    return _ReduceScatter.apply(x, dim, group) if group.size() > 1 else x


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Rows of x [sum(sent), ...], so many to each rank, for rows [sum(received), ...] from each; gradients go the way back."""
    return _AllToAll.apply(x, sent, received, group) if group.size() > 1 else x


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _sum(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _gather(x: Tensor, dim: int, group: Group) -> Tensor:
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _gather_tensor(out, x.contiguous(), group=group)
    return out if dim == 0 else torch.cat(out.chunk(group.size()), dim)


def _scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(group.size(), dim))
    out = x.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    _scatter_tensor(out, parts, group=group)
    return out


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
