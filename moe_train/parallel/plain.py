"""A decoder whose parameters are plain fp32 tensors, for an engine that shares them out by itself."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_train.model.decoder import Decoder
from moe_train.model.routing import Router


def make_plain(model: Decoder) -> None:
    """Make each parameter of which the layout gave this rank a part that part, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = parameter.detach()
            if isinstance(whole, DTensor):
                module.register_parameter(name, nn.Parameter(whole.to_local(), requires_grad=parameter.requires_grad))


def compute_in(model: Decoder, dtype: torch.dtype) -> None:
    """Let every parameter but the routers' read as `dtype` inside of its module; what it holds, and its gradient, stay fp32.

    The numbers are those of FSDP2's mixed precision (`moe_train.parallel.fsdp`): one rounding of each weight, fp32 sums of gradients.
    """
    kept: list[nn.Module] = [module for module in model.modules() if isinstance(module, Router)]
    if model.shared_router is not None:
        kept.append(model.shared_router)
    wide = {id(part) for module in kept for part in module.modules()}
    for module in model.modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names and id(module) not in wide:
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {name: property(partial(_read, name, dtype)) for name in names})


def _read(name: str, dtype: torch.dtype, module: nn.Module) -> Tensor | None:
    value = module._parameters[name]
    return None if value is None else value.to(dtype)
