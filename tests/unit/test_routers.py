"""Top-k and recurrent routing against closed forms and independent implementations."""

import pytest
import torch
from models import RECURRENT, TOPK, batch_of, config_of, decoder_of
from torch import Tensor, nn

from moe_kernels import get_backend
from moe_train import routers
from moe_train.config import ModelConfig, RouterConfig
from moe_train.model.decoder import Decoder
from moe_train.model.init import initialise
from moe_train.model.routing import Router, router_class

BALANCED = {"balance_weight": 1.0}


def make(router: dict, layers: int = 1, **model: int) -> tuple[list[Router], nn.Module | None, ModelConfig]:
    config = config_of(router, **model).model
    kind = router_class(config.router)
    found = [kind(config.router, config, i, get_backend("torch")).double() for i in range(layers)]
    shared = kind.make_shared(config.router, config, get_backend("torch"))
    for i, module in enumerate([*found, *([shared] if shared else [])]):
        initialise(module.double(), i)
    return found, shared, config


def states(
    router: dict, inputs: list[Tensor], weights: float | None = None, bias: float = 0.0
) -> tuple[list[Tensor], list, nn.Module]:
    """The state after each layer for one row per input, with every cell weight set to `weights` where given."""
    found, shared, config = make(router, len(inputs))
    if weights is not None:
        for name, p in shared.named_parameters():
            nn.init.constant_(p, weights if "weight" in name else bias)
    batch, _ = batch_of([[inputs[0].shape[1]]] * inputs[0].shape[0])
    state = torch.zeros(*inputs[0].shape[:2], found[0].state_size_of(config.router, config), dtype=torch.float64)
    out = []
    for layer, x in zip(found, inputs, strict=True):
        routing = layer(x, state, batch, shared)
        state = routing.state
        out.append(routing)
    return [r.state for r in out], out, shared


def rows(seed: int = 0, n: int = 6) -> Tensor:
    return torch.randn(1, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("cell", "torch_cell"), [("gru", nn.GRUCell), ("rnn", nn.RNNCell), ("lstm", nn.LSTMCell)])
@pytest.mark.parametrize("projector", ["layer", "shared"])
def test_the_cell_is_torchs(cell: str, torch_cell: type, projector: str) -> None:
    router = {**RECURRENT, "cell": cell, "projector": projector}
    found, shared, _ = make(router, 3)
    twin = torch_cell(8 if projector == "layer" else 16, 8).double()
    twin.load_state_dict(shared.state_dict())
    batch, _ = batch_of([[6]])
    state = torch.zeros(1, 6, 16 if cell == "lstm" else 8, dtype=torch.float64)
    h = c = torch.zeros(6, 8, dtype=torch.float64)
    for i, layer in enumerate(found):
        x = rows(i)
        routing = layer(x, state, batch, shared)
        state = routing.state
        z = (x[0] @ layer.projector.T) if projector == "layer" else x[0]
        if cell == "lstm":
            h, c = twin(z, (h, c))
            torch.testing.assert_close(state[0], torch.cat([h, c], -1), rtol=0, atol=1e-12)
        else:
            h = twin(z, h)
            torch.testing.assert_close(state[0], h, rtol=0, atol=1e-12)
        scores = (h @ layer.scorer.T).softmax(-1)
        top = scores.topk(2)
        assert torch.equal(routing.expert_ids.long(), top.indices)
        torch.testing.assert_close(routing.weights, top.values / top.values.sum(-1, keepdim=True), rtol=1e-10, atol=0)


def test_closed_forms_of_the_recurrence() -> None:
    """One unit, all cell weights 1, biases 0, z = 1 at every layer."""
    inputs = [torch.ones(1, 1, 16, dtype=torch.float64)] * 4
    for passing, expected in (("full", [0.204824, 0.346753, 0.451697, 0.532541]), ("none", [0.204824] * 4)):
        router = {**RECURRENT, "router_size": 1, "passing": passing}
        found, shared, _ = make(router, 4)
        for p in shared.parameters():
            nn.init.constant_(p, 1.0 if p.ndim == 2 else 0.0)
        batch, _ = batch_of([[1]])
        state = torch.zeros(1, 1, 1, dtype=torch.float64)
        for layer, value in zip(found, expected, strict=True):
            nn.init.constant_(layer.projector, 1.0 / 16)
            routing = layer(inputs[0], state, batch, shared)
            state = routing.state
            assert float(state) == pytest.approx(value, abs=1e-6)


def test_limits_of_the_update_gate() -> None:
    zero, _, _ = states(RECURRENT, [rows(0), rows(1)], weights=0.0)
    assert all(float(s.abs().max()) == 0.0 for s in zero)
    for bias, same in ((50.0, True), (-50.0, False)):
        found, shared, _ = make(RECURRENT, 1)
        nn.init.constant_(shared.bias_ih[8:16], bias)
        nn.init.zeros_(shared.weight_hh[16:])
        nn.init.zeros_(shared.bias_hh[16:])
        batch, _ = batch_of([[6]])
        x = rows()
        state = found[0](x, torch.zeros(1, 6, 8, dtype=torch.float64), batch, shared).state
        z = x @ found[0].projector.T
        expected = torch.zeros_like(state) if same else torch.tanh(z @ shared.weight_ih[16:].T + shared.bias_ih[16:])
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("passing", "reaches", "recurrent_weights"), [("full", True, True), ("none", False, False), ("detached", False, True)]
)
def test_gradient_through_depth(passing: str, reaches: bool, recurrent_weights: bool) -> None:
    """The loss is on the last layer's scores; with no other path between layers, only the state carries it to the first."""
    inputs = [rows(i).requires_grad_() for i in range(4)]
    _, out, shared = states({**RECURRENT, "passing": passing}, inputs)
    (out[-1].weights * torch.arange(2.0)).sum().backward()
    assert (inputs[0].grad is not None and float(inputs[0].grad.abs().max()) > 0) == reaches
    assert float(inputs[-1].grad.abs().max()) > 0
    assert (float(shared.weight_hh.grad.abs().max()) > 0) == recurrent_weights


def test_tokens_do_not_mix() -> None:
    inputs = [rows(i) for i in range(3)]
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    plain, _, _ = states(RECURRENT, inputs)
    shuffled, _, _ = states(RECURRENT, [x[:, order] for x in inputs])
    for a, b in zip(plain, shuffled, strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("router", "expected"),
    [({"name": "recurrent", "router_size": 128, "top_k": 4}, 4_080_384), ({"name": "topk", "top_k": 4}, 491_520)],
)
def test_router_parameters_of_the_flagship(router: dict, expected: int) -> None:
    config = config_of(
        router, hidden_size=1280, num_layers=24, num_heads=20, num_experts=16, ffn_hidden_size=448, vocab_size=96512
    )
    with torch.device("meta"):
        model = Decoder(config.model, get_backend("torch"))
    assert sum(p.numel() for n, p in model.named_parameters() if "router" in n) == expected


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_balance_loss_is_one_at_uniform_routing(scores: str, scope: str) -> None:
    found, _, _ = make({**TOPK, **BALANCED, "scores": scores, "balance_scope": scope, "top_k": 4})
    batch, _ = batch_of([[6]])
    nn.init.zeros_(found[0].weight)
    routing = found[0](rows(), torch.zeros(1, 6, 0), batch, None)
    assert float(routing.losses["balance"]) / 6 == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_balance_loss_by_hand(scope: str) -> None:
    """Against a loop over rows, tokens and experts."""
    found, _, _ = make({**TOPK, **BALANCED, "balance_scope": scope})
    router = found[0]
    router.fractions.copy_(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    batch, _ = batch_of([[6], [6]])
    x = torch.cat([rows(1), rows(2)])
    routing = router(x, torch.zeros(2, 6, 0), batch, None)
    probs = (x @ router.weight.T).softmax(-1)
    ids = routing.expert_ids.view(2, 6, 2)
    total = 0.0
    for row in range(2):
        for t in range(6):
            for e in range(4):
                if scope == "sequence":
                    fraction = float((ids[row] == e).double().mean())
                elif scope == "micro_batch":
                    fraction = float((ids == e).double().mean())
                else:
                    fraction = float(router.fractions[e])
                total += 4 * fraction * float(probs[row, t, e])
    assert float(routing.losses["balance"]) == pytest.approx(total, rel=1e-9)


def test_balance_gradient_pushes_mass_from_the_fullest_expert() -> None:
    found, _, _ = make({**TOPK, **BALANCED})
    router = found[0]
    with torch.no_grad():
        router.weight[0] += 1.0
    batch, _ = batch_of([[6]])
    x = torch.ones(1, 6, 16, dtype=torch.float64)
    router(x, torch.zeros(1, 6, 0), batch, None).losses["balance"].backward()
    assert float(router.weight.grad[0].sum()) > 0  # descent lowers the fullest expert's logit
    assert float(router.weight.grad[1:].sum()) < 0


@pytest.mark.parametrize("router", [TOPK, RECURRENT])
def test_top_one_has_a_router_gradient(router: dict) -> None:
    config = config_of({**router, "top_k": 1, "renormalize": False, "balance_weight": 0.0})
    model = decoder_of(config.model)
    batch, targets = batch_of([[12]])
    model(batch, targets).loss.backward()
    for name, p in model.named_parameters():
        if "router" in name and "hh" not in name:
            assert float(p.grad.abs().max()) > 0, name


def test_after_step_keeps_the_steps_loads() -> None:
    found, _, _ = make(TOPK)
    found[0].after_step({"tokens_per_expert": torch.tensor([6, 2, 0, 0])}, 0.5)
    assert found[0].fractions.tolist() == [0.75, 0.25, 0.0, 0.0]


def test_registry_names_every_router() -> None:
    assert {"topk", "recurrent"} <= set(routers.registry())


def test_a_configuration_without_a_router_is_named() -> None:
    class Lonely(RouterConfig):
        name: str

    with pytest.raises(TypeError, match=r"decorate its class with @register\(Lonely\)"):
        router_class(Lonely(name="lonely"))
