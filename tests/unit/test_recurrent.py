"""RMoE's variants: gate residual, cosine scoring, initial spread of logits, and what is frozen."""

import math

import pytest
import torch
from models import RECURRENT, batch_of, config_of, decoder_of
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.model.init import initialise
from moe_train.model.routing import Routing
from moe_train.routers.recurrent import RecurrentConfig, RecurrentRouter

NP = {**RECURRENT, "passing": "none"}


def make(settings: dict, layers: int = 1, **model: int) -> tuple[list[RecurrentRouter], nn.Module, int]:
    """fp64 routers of some layers, the cell that they share, and the columns of their state."""
    config = config_of(settings, num_layers=layers, **model).model
    assert isinstance(config.router, RecurrentConfig)
    found = [RecurrentRouter(config.router, config, i, get_backend("torch")).double() for i in range(layers)]
    shared = RecurrentRouter.make_shared(config.router, config, get_backend("torch")).double()
    for seed, module in enumerate([*found, shared]):
        initialise(module, seed)
        for p in module.parameters():
            p.data *= 10  # wide enough for choices to differ
    return found, shared, RecurrentRouter.state_size_of(config.router, config)


def depth(settings: dict, inputs: list[Tensor]) -> list[Routing]:
    """What each layer decides for one row; the state goes from layer to layer."""
    found, shared, columns = make(settings, len(inputs))
    batch, _ = batch_of([[inputs[0].shape[1]]])
    state, out = torch.zeros(1, inputs[0].shape[1], columns, dtype=torch.float64), []
    for router, x in zip(found, inputs, strict=True):
        out.append(router(x, state, batch, shared))
        state = out[-1].state
    return out


def rows(seed: int) -> Tensor:
    return torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores_by_torch(settings: dict, inputs: list[Tensor]) -> list[Tensor]:
    """softmax of each layer's own logits, by torch.nn.GRUCell without passing: [T, E] each."""
    found, shared, _ = make(settings, len(inputs))
    twin = nn.GRUCell(8, 8).double()
    twin.load_state_dict(shared.state_dict())
    return [(twin(x[0] @ r.projector.T) @ r.scorer.T).softmax(-1) for r, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_residual(weight: float, renormalize: bool) -> None:
    """Each layer chooses from its scores and the layer's before, and hands its own on, not the sum."""
    inputs = [rows(i) for i in range(4)]
    settings = {**NP, "residual": weight, "renormalize": renormalize}
    own, previous, differs = scores_by_torch(settings, inputs), torch.zeros(6, 4), False
    for routing, scores in zip(depth(settings, inputs), own, strict=True):
        mixed = scores + weight * previous
        top = mixed.topk(2)
        expected = top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values
        assert torch.equal(routing.expert_ids.long(), top.indices)
        torch.testing.assert_close(routing.weights, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(routing.state[0, :, -4:], scores, rtol=1e-12, atol=0)
        assert routing.stats["tokens_per_expert"].tolist() == torch.bincount(top.indices.flatten(), minlength=4).tolist()
        differs |= not torch.equal(top.indices, scores.topk(2).indices)
        previous = scores
    assert differs  # the residual changed somebody's choice


def test_gate_residual_reaches_back_one_layer() -> None:
    for detach in (False, True):
        inputs = [rows(i).requires_grad_() for i in range(4)]
        out = depth({**NP, "residual": 0.5, "detach_residual": detach}, inputs)
        (out[-1].weights * torch.arange(2.0)).sum().backward()
        reached = [x.grad is not None and float(x.grad.abs().max()) > 0 for x in inputs]
        assert reached == [False, False, not detach, True]


def test_gate_residual_beside_a_state_that_passes() -> None:
    """The cell never sees the scores' columns."""
    inputs = [rows(i) for i in range(3)]
    plain, mixed = depth(RECURRENT, inputs), depth({**RECURRENT, "residual": 0.5}, inputs)
    for a, b in zip(plain, mixed, strict=True):
        torch.testing.assert_close(b.state[..., :8], a.state, rtol=0, atol=0)
        assert b.state.shape[-1] == 12


def test_cosine_scoring_of_the_state() -> None:
    settings = {**RECURRENT, "scoring": "cosine", "cosine_size": 4, "temperature": 0.2}
    found, shared, _ = make(settings)
    nn.init.constant_(found[0].scorer.log_scale, 1.5)  # it was scaled with the weights
    x = rows(0)
    routing = found[0](x, torch.zeros(1, 6, 8, dtype=torch.float64), batch_of([[6]])[0], shared)
    z = routing.state[0] @ found[0].scorer.projector.T
    logits = torch.stack([F.cosine_similarity(z, e, dim=-1) for e in found[0].scorer.embeddings], -1) * math.exp(1.5)
    top = logits.softmax(-1).topk(2)
    assert torch.equal(routing.expert_ids.long(), top.indices)
    torch.testing.assert_close(routing.weights, top.values / top.values.sum(-1, keepdim=True), rtol=1e-9, atol=0)


def logit_std(settings: dict, hidden: int, size: int) -> float:
    """Of the first layer's logits at the start, for rows with a mean square of 1; over four seeds."""
    sizes = {"hidden_size": hidden, "num_experts": 16, "num_layers": 1, "ffn_hidden_size": 8}
    config = config_of({**settings, "router_size": size}, **sizes).model
    x = torch.randn(512, hidden, generator=torch.Generator().manual_seed(0))
    logits = []
    for seed in range(4):
        model = decoder_of(config, torch.float32, seed=seed)
        router, cell = model.layers["0"].mlp.router, model.shared_router
        z = x @ router.projector.T if config.router.projector == "layer" else x
        state = cell(z, torch.zeros(512, RecurrentRouter.state_size_of(config.router, config)))
        logits.append((state[:, :size] @ router.scorer.T).detach())
    return float(torch.stack(logits).std())


def test_initial_logits_as_published() -> None:
    """At the flagship's width they have a deviation of 0.043; a linear gate's have 0.71."""
    assert logit_std(RECURRENT, 1280, 128) == pytest.approx(0.043, abs=0.004)


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm"])
@pytest.mark.parametrize("projector", ["layer", "shared"])
def test_initial_logits_as_a_linear_gates(cell: str, projector: str) -> None:
    settings = {**RECURRENT, "cell": cell, "projector": projector, "initial_logits": "linear"}
    assert logit_std(settings, 256, 64) == pytest.approx(0.02 * 256**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"projector", "scorer", "cell"}),
        ({"frozen": True}, {"cell"}),
        ({"frozen_cell": True}, {"projector", "scorer"}),
        ({"frozen": True, "frozen_cell": True}, set()),
    ],
)
def test_what_is_frozen(settings: dict, trained: set[str]) -> None:
    model = decoder_of(config_of({**RECURRENT, **settings}).model)
    batch, targets = batch_of([[12]])
    model(batch, targets).loss.backward()
    names = [name for name, p in model.named_parameters() if "router" in name and p.grad is not None]
    assert {"cell" if name.startswith("shared_router") else name.split(".")[-1] for name in names} == trained
    assert all(p.grad is not None for name, p in model.named_parameters() if "router" not in name)


def test_a_dense_layer_passes_the_state_on() -> None:
    model = decoder_of(config_of({"name": "recurrent", "router_size": 8}, num_layers=3, moe_layer_freq=[1, 0, 1]).model)
    states = []
    for name in ("0", "2"):
        router = model.layers[name].mlp.router
        router.register_forward_hook(lambda module, args, out: states.extend([args[1], out.state]))
    model(batch_of([[6]])[0])
    assert torch.equal(states[1], states[2])
    assert float(states[1].detach().abs().max()) > 0


def test_cosine_logits_have_a_temperature() -> None:
    with pytest.raises(UserError, match=r"model\.router\.initial_logits=linear: the spread of cosine logits"):
        parse({"model": {"router": {**RECURRENT, "scoring": "cosine", "initial_logits": "linear"}}}, "test")
