"""The one file that knows MegaBlocks (Gale et al., arXiv 2211.15841): which versions fit, why a path is unavailable, its grouped GEMM.

Of the package only `megablocks.grouped_gemm_util` is used, the grouped GEMM of its dropless layers, on the package grouped_gemm. Its
layers are not: they keep losses and token counts in global lists, and have routers of their own.

Its block-sparse path (a sparse matrix of 128 x 128 blocks in the place of groups) cannot be had beside the torch that this package
needs: MegaBlocks refuses it with triton 3.2 and newer, and torch 2.11 comes with triton 3.6. `why_no_block_sparse` says so.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from moe_kernels.errors import KernelError

log = logging.getLogger(__name__)

VERSIONS = {"megablocks": (0, 10), "grouped_gemm": (0, 3)}  # major and minor whose source was read
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)
UNIT = 8  # elements of 16 bytes, which its CUTLASS kernels load at once
MAX_EXPERTS = 512  # its kernel that reads sizes on the device is one block with a thread for each
INSTALL = "docs/install.md says how (docker/install_gpu.sh does it)"


def why_unavailable(device: torch.device) -> str | None:
    """Why MegaBlocks' grouped GEMM cannot run on `device`, with the remedy; None where it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels are for compute capability 8.0 and newer"
    if why := why_other_versions():
        return why
    try:
        _load_gmm()
    except Exception as error:  # what a package built for another torch raises when it is imported is anything
        return f"megablocks cannot be imported ({type(error).__name__}: {error}); build it for this torch: {INSTALL}"
    return None


def why_other_versions() -> str | None:
    """Which of the two packages is missing or has another version."""
    for package, (major, minor) in VERSIONS.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            return f"{package} is not installed; {INSTALL}"
        if installed.split(".")[:2] != [str(major), str(minor)]:
            return f"{package} is {installed}, and {major}.{minor} is needed; {INSTALL}"
    return None


def why_no_block_sparse() -> str:
    """Why the block-sparse path is not used."""
    try:
        found = f"triton is {version('triton')}"
    except PackageNotFoundError:
        found = "triton is not installed"
    return f"megablocks refuses its block-sparse kernels with triton 3.2 and newer, and {found}"


def require_supported(op: str, x: Tensor, *widths: int) -> None:
    """Raise KernelError where its grouped GEMM cannot take operands like x, with matrices that are so wide."""
    if x.dtype not in DTYPES:
        name = str(x.dtype).removeprefix("torch.")
        raise KernelError(f"{op}: megablocks computes in bfloat16, got {name}; use kernels.backend=triton or torch")
    if wrong := [width for width in widths if width % UNIT]:
        raise KernelError(
            f"{op}: megablocks needs widths that are multiples of {UNIT}, got {wrong}; use kernels.backend=triton"
        )


def group_sizes(offsets: Tensor) -> Tensor:
    """Rows of each group, int64, where its grouped GEMM reads them: offsets [E + 1] int32 -> [E].

    Built with GROUPED_GEMM_CUTLASS=1 it reads them on the device; built for cuBLAS, on the host, which then waits for the device.
    """
    sizes = offsets.diff().long()
    return sizes if len(sizes) <= MAX_EXPERTS and _reads_on_device(sizes.device) else sizes.cpu()


def gmm(a: Tensor, b: Tensor, sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """Groups of rows of a [M, C] times b [E, C, N] ([E, N, C] with trans_b) -> [M, N]; with trans_a, their outer products with those of
    b [M, N] -> [E, C, N]. Rows after the last group are neither read nor written."""
    out: Tensor = _load_gmm()(a, b, sizes, trans_a=trans_a, trans_b=trans_b)
    return out


@cache
def _load_gmm() -> Callable[..., Tensor]:
    backend = importlib.import_module("megablocks.grouped_gemm_util").backend
    if backend is None:
        raise ImportError("megablocks.grouped_gemm_util found no grouped_gemm")
    function: Callable[..., Tensor] = backend.gmm
    return function


@cache
def _reads_on_device(device: torch.device) -> bool:
    """Whether grouped_gemm was built with its CUTLASS kernels, which a call with sizes on the device tells."""
    if device.type != "cuda":
        return False
    ones = torch.ones(1, UNIT, UNIT, dtype=DTYPES[0], device=device)
    try:
        _load_gmm()(ones[0], ones, torch.tensor([UNIT], device=device), trans_a=False, trans_b=False)
    except RuntimeError:
        log.warning(
            "kernels: grouped_gemm was built for cuBLAS and waits for the device; GROUPED_GEMM_CUTLASS=1 builds the other"
        )
        return False
    return True
