"""Initial values, drawn from a seed per parameter name, so that no layout changes them.

A module that owns parameters or buffers has an attribute `initial`: name -> Normal, Uniform, Constant or Orthogonal.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


Initial = Normal | Uniform | Constant | Orthogonal


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer, sharded or not, with the values that its name and `seed` give."""
    for name, initial, tensor in _declared(model):
        values = draw(name, initial, tensor.shape, seed).to(tensor.dtype)
        if isinstance(tensor, DTensor):
            values = values.to(tensor.device)
            tensor.copy_(distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(values)


def draw(name: str, initial: Initial, shape: torch.Size, seed: int) -> Tensor:
    """The full tensor of one parameter, fp32 on the CPU (the same on every device and layout)."""
    values = torch.empty(shape)
    if isinstance(initial, Constant):
        return values.fill_(initial.value)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if isinstance(initial, Normal):
        return values.normal_(0.0, initial.std, generator=generator)
    if isinstance(initial, Orthogonal):
        return nn.init.orthogonal_(values, initial.gain, generator=generator)
    return values.uniform_(-initial.bound, initial.bound, generator=generator)


def _declared(model: nn.Module) -> Iterator[tuple[str, Initial, Tensor]]:
    for path, module in model.named_modules():
        for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            declared = getattr(module, "initial", {})
            if name not in declared:
                raise TypeError(f"{type(module).__name__} declares no initial value for {full}: add it to its `initial`")
            yield full, declared[name], tensor
