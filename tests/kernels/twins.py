"""Run an op of one backend beside its naive twin in fp64, and compare the outputs and all gradients."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_kernels import launch

_MODULES = {"torch": "with_torch", "triton": "with_triton", "reference": "reference"}
# relative errors against fp64 on the same (rounded) inputs: of the norm, and of the largest entry (kernel design, numerics)
_TOLERANCES = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (1e-3, 6e-3),
    torch.bfloat16: (6e-3, 3e-2),
}


class Where(NamedTuple):
    """Which implementation runs, on which device, in which compute dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    def op(self, folder: str, name: str) -> Callable:
        if self.backend == "triton" and self.device == "cpu" and not launch.INTERPRETED:
            pytest.skip("a machine with a GPU runs the kernels there")
        return getattr(importlib.import_module(f"moe_kernels.{folder}.{_MODULES[self.backend]}"), name)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of states, statistics and master weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """Values that the compute dtype (or the wide one) holds exactly, drawn from torch's CPU generator."""
        return (torch.randn(*shape) * scale).to(self.device, self.wide if wide else self.dtype)


def _param(backend: str, device: str, dtype: torch.dtype) -> Any:
    name = f"{backend}-{device}-{str(dtype).removeprefix('torch.')}"
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.param(Where(backend, device, dtype), id=name, marks=[pytest.mark.gpu, absent] if device == "cuda" else [])


# the interpreter's bf16 products are wrong, and its bf16 stores truncate: bf16 kernels are tested on a GPU
EVERYWHERE = [
    *(_param("torch", "cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(_param("triton", "cpu", dtype) for dtype in (torch.float32, torch.float16)),
    *(_param(backend, "cuda", dtype) for backend in ("torch", "triton") for dtype in (torch.bfloat16, torch.float16)),
    _param("triton", "cuda", torch.float32),
]
TRITON = [where for where in EVERYWHERE if where.values[0].backend == "triton"]
TRITON_FLOAT32 = [where for where in TRITON if where.values[0].dtype == torch.float32]
ON_GPU = [where for where in EVERYWHERE if where.values[0].device == "cuda" and where.values[0].dtype != torch.float32]
ONE_OF_EACH = [
    _param("reference", "cpu", torch.float32),
    _param("torch", "cpu", torch.float32),
    _param("triton", "cpu", torch.float32),
    _param("triton", "cuda", torch.float32),
]


class Result(NamedTuple):
    outputs: list[Tensor]
    grads: list[Tensor]


def run(op: Callable, args: Sequence[Any], grad_of: Sequence[int], **options: Any) -> Result:
    """Outputs of op(*args, **options) and, for a fixed random weighting of them, the gradients of the arguments `grad_of`."""
    args = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
    for i in grad_of:
        args[i].requires_grad_()
    outputs = op(*args, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for y in outputs:
        upstream = torch.randn(y.shape, generator=generator).to(torch.bfloat16)  # values that every dtype holds
        if y.requires_grad:
            loss = loss + (y.double() * upstream.to(y.device).double()).sum()
    return Result(outputs, list(torch.autograd.grad(loss, [args[i] for i in grad_of])))


def compare(
    where: Where,
    folder: str,
    name: str,
    args: Sequence[Any],
    grad_of: Sequence[int],
    tolerance: tuple[float, float] | None = None,
    **options: Any,
) -> Result:
    """Check op `name` of `where` against the reference in fp64; returns what the op returned."""
    result = run(where.op(folder, name), args, grad_of, **options)
    exact = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    reference = run(Where("reference", where.device, torch.float64).op(folder, name), exact, grad_of, **options)
    tolerance = tolerance or _TOLERANCES[where.dtype]
    for i, (mine, truth) in enumerate(zip(result.outputs, reference.outputs, strict=True)):
        assert_close(mine, truth, tolerance, f"output {i}")
    for i, mine, truth in zip(grad_of, result.grads, reference.grads, strict=True):
        assert mine.dtype == args[i].dtype, f"gradient of argument {i} is {mine.dtype}"
        assert_close(mine, truth, tolerance, f"gradient of argument {i}")
    return result


def assert_close(mine: Tensor, truth: Tensor, tolerance: tuple[float, float], what: str) -> None:
    assert mine.shape == truth.shape, f"{what}: {tuple(mine.shape)} is not {tuple(truth.shape)}"
    if not truth.is_floating_point():
        assert torch.equal(mine.cpu(), truth.cpu()), what
        return
    if not truth.numel():
        return
    mine, truth = mine.double().cpu(), truth.double().cpu()
    assert mine.isfinite().all(), f"{what} is not finite"
    error = mine - truth
    norm = (error.norm() / truth.norm().clamp_min(1e-30)).item() if truth.any() else error.norm().item()
    largest = (error.abs().max() / truth.abs().max().clamp_min(1e-30)).item() if truth.any() else error.abs().max().item()
    assert norm <= tolerance[0], f"{what}: relative error of the norm {norm:.2e} is above {tolerance[0]:.0e}"
    assert largest <= tolerance[1], f"{what}: largest relative error {largest:.2e} is above {tolerance[1]:.0e}"


def assert_bitwise_equal(
    where: Where, folder: str, name: str, args: Sequence[Any], grad_of: Sequence[int], **options: Any
) -> None:
    """Two runs give the same bits."""
    first, second = (run(where.op(folder, name), args, grad_of, **options) for _ in range(2))
    for a, b in zip([*first.outputs, *first.grads], [*second.outputs, *second.grads], strict=True):
        assert torch.equal(a, b)


def assert_compiles(
    where: Where, folder: str, name: str, make_args: Callable[[int], Sequence[Any]], grad_of: Sequence[int]
) -> None:
    """torch.compile traces the op into one graph and gives the same values, for several token counts from one compilation."""
    op = where.op(folder, name)
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 12, 33):
        args = make_args(tokens)
        mine, truth = run(compiled, args, grad_of), run(op, args, grad_of)
        for a, b in zip([*mine.outputs, *mine.grads], [*truth.outputs, *truth.grads], strict=True):
            torch.testing.assert_close(a, b)
