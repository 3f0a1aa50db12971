"""What a GPU would be asked to run, found without one: under FakeTensorMode on fake CUDA tensors, with the tables of each architecture,
every op runs its own code up to the launches, which are recorded.

That no value is looked at on the way (a fake tensor has none) is what a CUDA graph needs: grids come from shapes alone.
"""

import inspect
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton.language as tl
from op_examples import FLAGSHIP, arguments, outputs_and_gradients, public_calls
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels import Backend, configs, get_backend, launch
from moe_kernels.aot import cases

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="a machine with a GPU launches them")
ARCHS = (80, 90, 100)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    kernel: object
    grid: tuple
    values: dict  # argument -> value, constexprs too
    warps: int
    stages: int

    def types(self):
        """The Triton type of each argument that is no constexpr, as an ahead-of-time case states it."""
        return {name: triton_type(value) for name, value in self.values.items() if name not in self.constants()}

    def constants(self):
        parameters = inspect.signature(self.kernel.fn).parameters
        return {name: value for name, value in self.values.items() if parameters[name].annotation is tl.constexpr}


def triton_type(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


class OnDevice(TorchDispatchMode):
    """Fails where a result leaves the device: a copy to the host waits for all that was launched."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(leaf.device.type == "cuda" for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), func
        return out


@pytest.fixture
def launches(monkeypatch):
    """Launches that were asked for, in order; none is run."""
    found = []

    def record(self, *args, grid, warmup, num_warps, num_stages, **constants):
        values = dict(zip(self.arg_names, args, strict=False)) | constants
        assert set(values) == set(self.arg_names), f"{self.fn.__name__} wants {self.arg_names}, got {sorted(values)}"
        found.append(Launch(self, grid, values, num_warps, num_stages))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)
    monkeypatch.setattr(launch, "_allocate", torch.empty)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configs, "_INTERPRETED", False)
    return found


def run(sizes, dtype, arch, monkeypatch):
    """Every op's own function, once for each of its examples."""
    chip = SimpleNamespace(major=arch // 10, minor=arch % 10, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(configs, "_device_arch", configs._device_arch.__wrapped__)
    with torch.no_grad(), FakeTensorMode():
        for name, calls in arguments("triton", sizes, dtype, torch.device("cuda")).items():
            for call in calls:
                with OnDevice():
                    OPDEFS[f"moe_kernels::{name}"]._init_fn(*call)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [0, 1, 63, FLAGSHIP.T])
def test_every_launch_is_one_that_cuda_accepts(tokens, arch, launches, monkeypatch):
    run(FLAGSHIP._replace(T=tokens), torch.bfloat16, arch, monkeypatch)
    assert tokens == 0 or {found.kernel for found in launches} == {case.kernel for _, case in cases()}
    for found in launches:
        name = found.kernel.fn.__name__
        x, y, z = (*found.grid, 1, 1)[:3]
        assert 0 < x < 2**31, name
        assert 0 < y < 2**16, name
        assert 0 < z < 2**16, name
        for argument, value in found.values.items():
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cuda", f"{name}: {argument}"
                assert value.is_contiguous(), f"{name}: {argument}"


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(arch, launches, monkeypatch):
    """Types, tiles, warps and stages of each launch at the flagship shape are those of a case of the ahead-of-time table."""
    run(FLAGSHIP, torch.bfloat16, arch, monkeypatch)
    compiled = [case for _, case in cases() if arch in case.archs]
    missing = set()
    for found in launches:
        facts = (found.types(), found.constants(), found.warps, found.stages)
        same = [case for case in compiled if case.kernel is found.kernel]
        if facts not in [(dict(case.types), dict(case.constexprs), case.num_warps, case.num_stages) for case in same]:
            missing.add(f"{found.kernel.fn.__name__}{facts}")
    assert not missing, "\n".join(sorted(missing))


def test_no_public_op_looks_at_a_value():
    """Forward and backward of all of them on meta tensors, which have no values."""
    calls = public_calls(get_backend("triton"), FLAGSHIP, "meta")
    for leaves, call in calls.values():
        outputs_and_gradients(call, [leaf.requires_grad_() for leaf in leaves])
    covered = {"sort_by_expert", "unpermute"}  # by permute's
    assert {*calls, *covered} == {*Backend._fields} - {"name"}
