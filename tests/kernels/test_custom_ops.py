"""Every custom op that the package registers passes torch.library's own checks: schema, fake kernel, autograd, tracing."""

import pytest
import torch
from op_examples import SMALL, arguments, names

from moe_kernels import launch

OPS = [(backend, name) for backend in ("torch", "triton") for name in names(backend)]


def test_every_op_has_examples(device):
    for backend in ("torch", "triton"):
        assert sorted(arguments(backend, SMALL, torch.float32, device)) == names(backend)


@pytest.mark.parametrize(("backend", "name"), OPS, ids=[name for _, name in OPS])
def test_opcheck(backend, name, device, monkeypatch):
    monkeypatch.setattr(launch, "_allocate", torch.empty)  # guard rows would be a storage offset that the fake kernel lacks
    torch.manual_seed(0)
    for call in arguments(backend, SMALL, torch.float32, device, learn=True)[name]:
        torch.library.opcheck(getattr(torch.ops.moe_kernels, name), call)
