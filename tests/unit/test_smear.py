"""SMEAR against loops, closed forms and its own decoding, in fp64; what it may not see; and merging itself."""

from dataclasses import replace

import pytest
import torch
from models import batch_of, config_of, decoder_of
from routing import ask, decode, layer_of, on_ranks, rows_of, run
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.model.experts import Experts, Merge
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo
from moe_train.routers.smear import drop_experts

SMEAR = {"name": "smear", "segment_size": 3, "expert_dropout": 0.0}
PACKED = [[6, 4], [10], [1, 2, 7]]


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [n, D] through one expert: gate_up [2, F, D], down [D, F]."""
    return (F.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T


def logits_of(layer: MoE, v: Tensor) -> Tensor:
    gate, size = layer.router.gate, (v.shape[-1],)
    weight = F.layer_norm(gate.weight, size, gate.weight_gain)
    return F.layer_norm(v, size, gate.input_gain, gate.input_bias) @ weight.T


def by_loops(layer: MoE, x: Tensor, batch: BatchInfo, size: int) -> Tensor:
    """Causal SMEAR, one segment after another."""
    out = torch.empty_like(x)
    for b, row in enumerate(x):
        start, mean = 0, torch.zeros(row.shape[1])
        while start < len(row):
            end = start + 1
            while end < len(row) and end - start < size and batch.doc_ids[b, end] == batch.doc_ids[b, start]:
                end += 1
            new = start == 0 or bool(batch.doc_ids[b, start] != batch.doc_ids[b, start - 1])
            probs = (layer.router.gate.first if new else logits_of(layer, mean)).softmax(-1)
            gate_up = torch.einsum("e,eijk->ijk", probs, layer.experts.gate_up)
            out[b, start:end] = swiglu(row[start:end], gate_up, torch.einsum("e,eij->ij", probs, layer.experts.down))
            mean = row[start:end].mean(0)
            start = end
    return out


@pytest.mark.parametrize("size", [1, 3, 4, 64])
def test_segments_by_loops(size: int) -> None:
    """Values and all gradients, for documents that segments do not divide."""
    layer = layer_of({**SMEAR, "segment_size": size}, spread=0.7)
    batch, _ = batch_of(PACKED)
    seen = []
    for compute in (lambda x: run(layer, x, batch), lambda x: by_loops(layer, x, batch, size)):
        x = rows_of(batch).requires_grad_()
        out = compute(x)
        (out * rows_of(batch, seed=1)).sum().backward()
        seen.append(
            (out.detach(), x.grad, {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
        )
        layer.zero_grad()
    unasked = {f"router.gate.{n}" for n in ("weight", "input_gain", "input_bias", "weight_gain")} if size == 64 else set()
    for name in unasked:  # no document is longer than a segment
        assert float(seen[0][2].pop(name).abs().max()) == 0.0
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-12)


def test_documents_by_loops() -> None:
    """The published form: each document through the experts merged for its own mean."""
    layer = layer_of({**SMEAR, "causal": False}, spread=0.7)
    batch, _ = batch_of(PACKED)
    x = rows_of(batch)
    expected = torch.empty_like(x)
    for b, row in enumerate(x):
        for document in batch.doc_ids[b].unique():
            part = batch.doc_ids[b] == document
            probs = logits_of(layer, row[part].mean(0)).softmax(-1)
            gate_up = torch.einsum("e,eijk->ijk", probs, layer.experts.gate_up)
            expected[b, part] = swiglu(row[part], gate_up, torch.einsum("e,eij->ij", probs, layer.experts.down))
    torch.testing.assert_close(run(layer, x, batch), expected, rtol=1e-10, atol=1e-12)


def test_routing_repeats_each_segments_probabilities() -> None:
    layer = layer_of(SMEAR, spread=0.7)
    batch, _ = batch_of([[7, 3]])
    routing = ask(layer.router, rows_of(batch), batch)
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3]] * 10
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(10, dtype=torch.float64))
    first = layer.router.gate.first.softmax(-1)
    segments = [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9]]
    for tokens in segments:
        assert (routing.weights[tokens] == routing.weights[tokens[0]]).all()
    for start in (0, 7):
        torch.testing.assert_close(routing.weights[start], first, rtol=1e-12, atol=0, check_dtype=False)
    assert len({tuple(routing.weights[s[0]].tolist()) for s in segments}) == 3
    torch.testing.assert_close(routing.stats["tokens_per_expert"], routing.weights.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(routing.stats["entropy"], torch.special.entr(routing.weights).sum(), rtol=1e-12, atol=0)


# merging


def experts_of(count: int = 4, size: int = 16, width: int = 8) -> Experts:
    config = config_of(SMEAR, num_experts=count, hidden_size=size, ffn_hidden_size=width, num_heads=1).model
    experts = Experts(config, get_backend("torch")).double()
    initialise(experts, 0)
    return experts


def merged(experts: Experts, x: Tensor, shares: list[float]) -> Tensor:
    probs = torch.tensor([shares], dtype=torch.float64)
    ids = torch.zeros(len(x), 1, dtype=torch.int32)
    return experts(x, ids, torch.ones_like(ids).double(), Merge(probs, probs))


def alone(experts: Experts, x: Tensor, expert: int) -> Tensor:
    return swiglu(x, experts.gate_up[expert], experts.down[expert])


def test_a_merge_is_no_ensemble() -> None:
    """Experts silu(x) and silu(-x) at x = 2 with shares of a half."""
    experts = experts_of(2, 2, 1)
    with torch.no_grad():
        experts.gate_up.copy_(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[-1.0, 0.0]], [[0.0, 1.0]]]]))
        experts.down.copy_(torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]]))
    x = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    assert float(merged(experts, x, [0.5, 0.5])[0, 0].detach()) == pytest.approx(0.0, abs=1e-12)
    ensemble = (alone(experts, x, 0) + alone(experts, x, 1)) / 2
    assert float(ensemble[0, 0].detach()) == pytest.approx(0.761594, abs=1e-6)


def test_merges_with_a_closed_form() -> None:
    experts = experts_of()
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(experts, x, [0.0, 0.0, 1.0, 0.0]), alone(experts, x, 2), rtol=1e-12, atol=1e-15)
    shares = [0.1, 0.2, 0.3, 0.4]
    with torch.no_grad():
        experts.gate_up.copy_(experts.gate_up[:1].expand_as(experts.gate_up))  # only the linear last projection differs
    ensemble = sum(p * alone(experts, x, e) for e, p in enumerate(shares))
    torch.testing.assert_close(merged(experts, x, shares), ensemble, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        experts.down.copy_(experts.down[:1].expand_as(experts.down))
    torch.testing.assert_close(merged(experts, x, shares), alone(experts, x, 3), rtol=1e-12, atol=1e-15)


def test_gradient_through_the_merge_by_finite_differences() -> None:
    layer = layer_of(SMEAR, spread=0.7)
    batch, _ = batch_of([[8]])
    x, slope = rows_of(batch), rows_of(batch, seed=1)
    weight = layer.router.gate.weight

    def loss() -> Tensor:
        return (run(layer, x, batch) * slope).sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    assert (grad.abs().amax(1) > 0).all()  # every expert's row
    for index in ((0, 0), (1, 5), (3, 15)):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] += step
                values.append(float(loss()))
                weight[index] -= step
        assert float(grad[index]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


# the published numbers


def test_expert_dropout_of_the_papers_code() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2]] * 2, dtype=torch.float64)
    kept = torch.tensor([[False, True, True], [False, False, False]])
    torch.testing.assert_close(
        drop_experts(probs, kept), torch.tensor([[2e-10, 0.6, 0.4], [1 / 3] * 3], dtype=torch.float64), rtol=1e-8, atol=1e-18
    )


def test_initial_router_of_the_published_size() -> None:
    """T5-base: D = 768, E = 8."""
    layer = layer_of(SMEAR, hidden_size=768, num_experts=8)
    gate = layer.router.gate
    normed = F.layer_norm(gate.weight, (768,), eps=1e-5)
    assert float(normed.detach().std()) == pytest.approx(0.953, abs=0.003)
    logits = logits_of(layer, torch.randn(64, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert float(logits.detach().std()) == pytest.approx(0.26, abs=0.02)
    assert float(logits.detach().softmax(-1).max()) == pytest.approx(0.27, abs=0.05)


# what a token sees


def changes(layer: MoE, batch: BatchInfo, position: int, row: int = 0) -> Tensor:
    """Which outputs [B, S] change with the hidden row at one position."""
    x = rows_of(batch)
    with torch.no_grad():
        before = run(layer, x, batch)
        x[row, position, 0] += 1.0  # and not all numbers alike, which layer norms cannot see
        return (run(layer, x, batch) - before).abs().amax(-1) > 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("position", range(10))
def test_a_token_changes_its_successors_segments_alone(position: int, dropout: float) -> None:
    """Documents of 7 and 3 tokens in segments of 3, in training: at the edges of segments and documents, and inside."""
    layer = layer_of({**SMEAR, "expert_dropout": dropout}, spread=0.7)
    batch, _ = batch_of([[7, 3], [10]])
    changed = changes(layer, batch, position)
    segment = {0: range(3, 6), 1: range(3, 6), 2: range(3, 6), 3: [6], 4: [6], 5: [6]}.get(position, [])
    assert changed.nonzero().tolist() == [[0, t] for t in sorted({position, *segment})]


def test_the_published_form_sees_the_future_and_says_so() -> None:
    layer = layer_of({**SMEAR, "causal": False}, spread=0.7)
    batch, _ = batch_of([[7, 3], [10]])
    assert changes(layer, batch, 6).nonzero().tolist() == [[0, t] for t in range(7)]
    assert layer.router.config.leaks()
    assert not layer_of(SMEAR).router.config.leaks()


def test_a_model_of_it_is_causal() -> None:
    model = decoder_of(config_of(SMEAR).model)
    for block in model.layers.values():
        nn.init.normal_(block.mlp.router.gate.weight_gain, std=1.0, generator=torch.Generator().manual_seed(1))
    batch, _ = batch_of([[7, 5]])
    with torch.no_grad():
        before = model(batch).logits
        for position in (0, 2, 3, 6, 7, 11):
            tokens = batch.tokens.clone()
            tokens[0, position] = (tokens[0, position] + 1) % 32
            other = replace(batch, tokens=tokens)
            changed = (model(other).logits - before).abs().amax(-1)[0] > 1e-12
            end = 7 if position < 7 else 12
            assert not changed[:position].any()
            assert not changed[end:].any()
            assert changed[position:end].all()


# decoding


@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 1, 3, 1], [3, 3, 3, 1], [10], [2, 8]])
def test_decoding_equals_the_full_forward(chunks: list[int]) -> None:
    layer = layer_of(SMEAR, spread=0.7).eval()
    batch, _ = batch_of([[10], [4, 6], [3, 7]])
    x = rows_of(batch)
    with torch.no_grad():
        torch.testing.assert_close(decode(layer, x, batch, chunks), run(layer, x, batch), rtol=1e-10, atol=1e-13)


def test_the_published_form_cannot_decode() -> None:
    layer = layer_of({**SMEAR, "causal": False}).eval()
    batch, _ = batch_of([[4]])
    memory = ask(layer_of(SMEAR).router, rows_of(batch), batch).memory
    with pytest.raises(UserError, match=r"model.router.causal=false.*causal=true"):
        ask(layer.router, rows_of(batch), batch, memory)


# randomness


def test_dropout_is_drawn_once_for_a_segment() -> None:
    layer = layer_of({**SMEAR, "expert_dropout": 0.5}, spread=0.2)
    batch, _ = batch_of([[200], [77, 123]])
    x = rows_of(batch)
    weights = ask(layer.router, x, batch).weights
    assert torch.equal(weights, ask(layer.router, x, batch).weights)
    dropped = (weights < 1e-8).view(2, 200, 4)
    assert torch.equal(dropped[:, :180].view(2, 60, 3, 4)[0].any(1), dropped[:, :180].view(2, 60, 3, 4)[0].all(1))
    assert 0.4 < float(dropped.double().mean()) < 0.55  # all four dropped, with probability 1/16, is uniform
    assert not torch.equal(dropped[0, :60], dropped[0, 60:120])
    later = replace(batch, step=1)
    assert not torch.equal(weights, ask(layer.router, x, later).weights)
    assert not (ask(layer.eval().router, x, batch).weights < 1e-8).any()


# positions on several ranks


CONTIGUOUS, ZIGZAG = torch.arange(12).view(2, 6), torch.tensor([[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("positions", [CONTIGUOUS, ZIGZAG, torch.arange(12).view(4, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_sharding_changes_nothing(causal: bool, positions: Tensor) -> None:
    whole, _ = batch_of([[7, 5], [12]])

    def work(batch: BatchInfo) -> tuple[Tensor, Tensor, list[Tensor]]:
        layer = layer_of({**SMEAR, "causal": causal, "expert_dropout": 0.2}, spread=0.7)
        x = batch.here(rows_of(whole)).contiguous().requires_grad_()
        routing = ask(layer.router, x, batch)
        out = layer.mix(x, routing, layer.plan(routing))
        (out * batch.here(rows_of(whole, seed=1))).sum().backward()
        return batch.whole(out), batch.whole(x.grad), [*(p.grad for p in layer.parameters()), *routing.stats.values()]

    expected, found = work(whole), on_ranks(positions, whole, work)
    for out, grad, _ in found:
        torch.testing.assert_close((out, grad), expected[:2], rtol=1e-10, atol=1e-12)
    for value, *parts in zip(expected[2], *(parts for _, _, parts in found), strict=True):
        torch.testing.assert_close(sum(parts), value, rtol=1e-10, atol=1e-12)


# refusals


@pytest.mark.parametrize("name", ["smear", "latent_skills", "adamix"])
def test_refused_layouts(name: str) -> None:
    with pytest.raises(UserError) as error:
        parse(
            {"model": {"router": {"name": name}, "capacity_factor": 1.0}, "parallel": {"ep": 2, "tp": 2, "expert_tp": 2}}, "run"
        )
    lines = str(error.value).splitlines()
    for key in ("parallel.ep=2", "parallel.expert_tp=2", "model.capacity_factor=1.0"):
        assert any(key in line and f"router {name}" in line for line in lines), key
    assert any("parallel.tp=2" in line and "adamix" in line for line in lines) == (name == "adamix")


def test_backends_agree() -> None:
    batch, _ = batch_of(PACKED)
    found = []
    for backend in ("reference", "torch"):
        layer = layer_of(SMEAR, spread=0.7)
        layer.experts.kernels = get_backend(backend)
        found.append(run(layer, rows_of(batch), batch))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)
