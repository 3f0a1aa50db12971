"""Choose which implementation of the ops runs: `reference` (loops, the truth), `torch` (any device), `triton` (CUDA) or `megablocks`,
which is triton with MegaBlocks' grouped GEMM in the place of its own.

A backend is a value: a tuple of functions with the same signatures, so that a model, a test or a benchmark swaps it by passing another.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from moe_kernels import megablocks
from moe_kernels.errors import KernelError

log = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "triton", "megablocks")
_MODULES = {"reference": "reference", "torch": "with_torch", "triton": "with_triton", "megablocks": "with_triton"}
_OF_MEGABLOCKS = {"grouped_mm": "with_megablocks", "moe_mlp": "with_megablocks"}
_OPS = {  # op -> the folder that holds its implementations
    "sort_by_expert": "permutation",
    "permute": "permutation",
    "unpermute": "permutation",
    "grouped_mm": "grouped_mm",
    "moe_mlp": "moe_mlp",
    "score_topk": "topk",
    "gru_step": "gru",
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "rope": "rope",
    "swiglu": "swiglu",
    "linear_cross_entropy": "cross_entropy",
}


class Backend(NamedTuple):
    """The ops of one implementation. Signatures are documented where each op's reference twin stands."""

    name: str
    sort_by_expert: Callable
    permute: Callable
    unpermute: Callable
    grouped_mm: Callable
    moe_mlp: Callable
    score_topk: Callable
    gru_step: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    rope: Callable
    swiglu: Callable
    linear_cross_entropy: Callable


def get_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """The backend called `name` for tensors on `device`. `auto` is triton on CUDA and torch elsewhere; the choice is logged once.

    Raises KernelError where `name` is unknown or was asked for by name and cannot run on `device`.
    """
    device = torch.device(device)
    if name == "auto":
        name, reason = _automatic(device)
    elif name not in BACKENDS:
        raise KernelError(f"kernels.backend={name!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")
    else:
        reason = "asked for by name"
        if name in _NEEDS and (why := _NEEDS[name](device)):
            raise KernelError(f"kernels.backend={name!r} cannot run on {device}: {why}. Use kernels.backend=auto or torch")
    return _load(name, str(device.type), reason)


def _automatic(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "torch", f"device is {device.type}, and triton kernels need CUDA"
    if why := _why_no_triton(device):
        return "torch", why
    return "triton", "device is CUDA"


def _why_no_triton(device: torch.device) -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error}); pip install triton"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "triton kernels need a CUDA device (or TRITON_INTERPRET=1 in tests)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _why_no_megablocks(device: torch.device) -> str | None:
    return _why_no_triton(device) or megablocks.why_unavailable(device)


_NEEDS = {"triton": _why_no_triton, "megablocks": _why_no_megablocks}


@cache
def _load(name: str, device: str, reason: str) -> Backend:
    log.info("kernels: backend %s on %s (%s)", name, device, reason)
    if name == "megablocks":
        log.info("kernels: grouped products by grouped_gemm; %s", megablocks.why_no_block_sparse())
    own = _OF_MEGABLOCKS if name == "megablocks" else {}
    files = {op: f"moe_kernels.{folder}.{own.get(op, _MODULES[name])}" for op, folder in _OPS.items()}
    ops = {op: getattr(importlib.import_module(file), op) for op, file in files.items()}
    return Backend(name=name, **ops)
