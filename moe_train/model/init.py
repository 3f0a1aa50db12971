"""Initial values, drawn from a seed per parameter name and expert, so that no layout changes them.

A module that owns parameters or buffers has an attribute `initial`: name -> Normal, Uniform, Constant, Orthogonal or Stack.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


class Normal(NamedTuple):
    """Zero mean, standard deviation `std`."""

    std: float


class Uniform(NamedTuple):
    """Between -bound and bound."""

    bound: float


class Constant(NamedTuple):
    """The same value everywhere."""

    value: float


class Orthogonal(NamedTuple):
    """A matrix with orthogonal rows (columns, where it has more rows) of length `gain`."""

    gain: float


class Stack(NamedTuple):
    """Entries along the first dim, each drawn from a seed of its own, so that a rank draws only those that it owns."""

    each: Normal | Uniform


Initial = Normal | Uniform | Constant | Orthogonal | Stack


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer, sharded or not, with the values that its name and `seed` give."""
    for name, initial, tensor in _declared(model):
        if not isinstance(tensor, DTensor):
            tensor.copy_(draw(name, initial, tensor.shape, seed))
        elif isinstance(initial, Stack):
            _fill_stack(tensor, name, initial, seed)
        else:
            values = draw(name, initial, tensor.shape, seed).to(tensor.device, tensor.dtype)
            tensor.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None))


def draw(name: str, initial: Initial, shape: torch.Size, seed: int) -> Tensor:
    """The full tensor of one parameter, fp32 on the CPU (the same on every device and layout)."""
    values = torch.empty(shape)
    if isinstance(initial, Constant):
        return values.fill_(initial.value)
    if isinstance(initial, Stack):
        for i, entry in enumerate(values):
            entry.copy_(_draw_entry(name, i, initial, shape, seed))
        return values
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if isinstance(initial, Normal):
        return values.normal_(0.0, initial.std, generator=generator)
    if isinstance(initial, Orthogonal):
        return nn.init.orthogonal_(values, initial.gain, generator=generator)
    return values.uniform_(-initial.bound, initial.bound, generator=generator)


def _draw_entry(name: str, index: int, initial: Stack, shape: torch.Size, seed: int) -> Tensor:
    """Entry `index` of a stack of `shape`."""
    return draw(f"{name}.{index}", initial.each, shape[1:], seed)


def _fill_stack(tensor: DTensor, name: str, initial: Stack, seed: int) -> None:
    """Draw the entries of which this rank has all or a part, one at a time."""
    mesh, local = tensor.device_mesh, tensor.to_local()
    first = [getattr(place, "dim", None) == 0 for place in tensor.placements]
    across = [place if yes else Replicate() for place, yes in zip(tensor.placements, first, strict=True)]
    inside = [Replicate() if yes else place for place, yes in zip(tensor.placements, first, strict=True)]
    indices = torch.arange(len(tensor), device=local.device)
    own = distribute_tensor(indices, mesh, across, src_data_rank=None).to_local().tolist()
    for index, mine in zip(own, local, strict=True):
        entry = _draw_entry(name, index, initial, tensor.shape, seed)[None].to(local.device, local.dtype)
        mine.copy_(distribute_tensor(entry, mesh, inside, src_data_rank=None).to_local()[0])


def _declared(model: nn.Module) -> Iterator[tuple[str, Initial, Tensor]]:
    for path, module in model.named_modules():
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            declared = getattr(module, "initial", {})
            if name not in declared:
                raise TypeError(f"{type(module).__name__} declares no initial value for {full}: add it to its `initial`")
            yield full, declared[name], tensor
