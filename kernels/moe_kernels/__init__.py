"""Kernels for mixture-of-experts transformers: pure functions of tensors and indices, with autograd, on torch and Triton.

One folder per op, with three implementations of one signature: `reference.py` (the naive twin, any float dtype, fp64 too, and the
op's documentation), `with_torch.py` (any device) and `with_triton.py` (CUDA). `get_backend` picks one.
"""

from moe_kernels.backend import BACKENDS, Backend, get_backend
from moe_kernels.errors import KernelError
from moe_kernels.types import Plan, Reduce, TileMap, TopK

__all__ = ["BACKENDS", "Backend", "KernelError", "Plan", "Reduce", "TileMap", "TopK", "get_backend"]
