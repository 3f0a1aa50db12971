"""The one place where kernels are launched and their memory is allocated."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from moe_kernels.configs import Config
from moe_kernels.errors import KernelError

INTERPRETED = bool(triton.knobs.runtime.interpret)
_MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # that CUDA launches along x, y and z
_allocate = torch.empty  # tests put a function here that poisons what it returns


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory."""
    return _allocate(tuple(shape), dtype=dtype, device=device)


def launch(kernel: Any, programs: int | tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Run `kernel` on a grid of `programs` with the warps and stages of `config`; an empty grid launches nothing.

    Raises KernelError for a grid that CUDA cannot launch.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    if any(count > most for count, most in zip(grid, _MOST_PROGRAMS, strict=False)):
        shapes = {name: list(arg.shape) for name, arg in zip(kernel.arg_names, args, strict=False) if isinstance(arg, Tensor)}
        rule = f"a grid of {grid} programs is above CUDA's {_MOST_PROGRAMS} (split the batch, or use kernels.backend=torch)"
        raise KernelError(
            f"{kernel.fn.__name__}: {rule}; got " + ", ".join(f"{name}={shape}" for name, shape in shapes.items())
        )
    if config.specialize:
        triton.set_allocator(_scratch)  # for descriptors made on the device; per thread, and autograd has threads of its own
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    constants |= {"num_warps": config.warps, "num_stages": config.stages}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, whatever its arguments say
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least n and `at_least`."""
    return max(at_least, 1 << max(n - 1, 0).bit_length())


def grid_size(tiles: int, config: Config, device: torch.device) -> int:
    """How many programs cover `tiles` output tiles: all of them, or what the device holds at once for a persistent kernel."""
    if not config.persistent:
        return tiles
    held = 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count * config.ctas
    return min(tiles, held)
