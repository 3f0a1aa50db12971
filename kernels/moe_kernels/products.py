"""Matrix products of the router's ops: which precision their operands and sums have."""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """a @ b with operands as they are and the result in `accumulate`."""
    if a.dtype == accumulate:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=accumulate)
    return a.to(accumulate) @ b.to(accumulate)  # CPU products have no wider output


def float32_precision() -> str:
    """tl.dot's precision of fp32 operands, which only tests and debugging use: torch's own setting for matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
