"""Every op under a CUDA graph captured at a fixed number of tokens: replayed on other values, it gives the bits of a plain call."""

import pytest
import torch
from op_examples import Sizes, outputs_and_gradients, public_calls

from moe_kernels import get_backend, launch

pytestmark = pytest.mark.gpu
SIZES = Sizes(T=300, E=8, K=2, D=256, F=128, P=64, V=1000, H=4, d=64)
NAMES = list(public_calls(None, SIZES, "meta"))


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_on_other_values(name, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(launch, "_allocate", torch.empty)
    torch.manual_seed(0)
    ops = get_backend("triton", "cuda")
    leaves, call = public_calls(ops, SIZES, "cuda")[name]
    values = [leaf.clone() for leaf in public_calls(ops, SIZES, "cuda")[name][0]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_gradients(call, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = outputs_and_gradients(call, leaves)
    with torch.no_grad():
        for leaf, value in zip(leaves, values, strict=True):
            leaf.copy_(value)
    graph.replay()
    expected = outputs_and_gradients(call, [value.requires_grad_() for value in values])
    for i, (replayed, plain) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(replayed.detach(), plain.detach()), f"result {i} of {name}"
