"""The decoder: what a row sees, what a forward changes, and what its parameters start from."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from models import RECURRENT, TOPK, batch_of, config_of, decoder_of, make_batch
from torch import Tensor, nn

from moe_train.parallel.recompute import apply_recompute

ROUTERS = [TOPK, RECURRENT, {**TOPK, "scores": "sigmoid", "z_weight": 0.01}, {**RECURRENT, "cell": "lstm"}]
SHAPES = [
    {},
    {"num_kv_heads": 1, "qk_norm": True},
    {"num_dense_layers": 1, "shared_expert_size": 8, "tie_embeddings": True},
]


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_nothing(router: dict, training: bool) -> None:
    model = decoder_of(config_of({**router, "balance_scope": "global_batch"}).model).train(training)
    batch, targets = batch_of([[7, 5], [12]])
    before = digest(model)
    model(batch, targets).loss.backward()
    model(batch)
    assert digest(model) == before


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_rows_equal_their_documents_one_by_one(router: dict, shape: dict) -> None:
    """A micro-batch's balance loss couples its documents by design, so each scope that does not is compared."""
    config = config_of({**router, "balance_scope": "global_batch"}, **shape)
    packed = decoder_of(config.model)
    batch, targets = batch_of([[7, 1, 4], [12]])
    output = packed(batch, targets)
    output.loss.backward()
    single = decoder_of(config.model)
    loss = 0.0
    for row, lengths in enumerate([[7, 1, 4], [12]]):
        start = 0
        for n in lengths:
            part = slice(start, start + n)
            tokens = batch.tokens[row : row + 1, part]
            alone = make_batch(tokens, torch.arange(n)[None], torch.zeros(1, n, dtype=torch.long), 24, 24)
            out = single(alone, targets[row : row + 1, part])
            out.loss.backward()
            loss += out.loss.item()
            start += n
    assert loss == pytest.approx(output.loss.item(), rel=1e-12)
    expected, actual = gradients(single), gradients(packed)
    assert expected.keys() == actual.keys() == dict(packed.named_parameters()).keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_token_changes_no_earlier_token_and_no_other_document(router: dict) -> None:
    model = decoder_of(config_of(router).model)
    batch, _ = batch_of([[6, 6]])
    before = model(batch).logits
    for position in range(12):
        tokens = batch.tokens.clone()
        tokens[0, position] = (tokens[0, position] + 1) % 32
        after = model(make_batch(tokens, batch.positions, batch.doc_ids)).logits
        changed = (after - before).abs().amax(-1)[0] > 1e-12  # a row's place in its expert's matrix product rounds differently
        end = 6 if position < 6 else 12
        assert not changed[:position].any()
        assert not changed[end:].any()
        assert changed[position:end].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree(shape: dict) -> None:
    config = config_of(RECURRENT, **shape)
    batch, targets = batch_of([[7, 5], [12]])
    found = []
    for backend in ("reference", "torch"):
        model = decoder_of(config.model, backend=backend)
        output = model(batch, targets)
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)


def test_the_loss_is_cross_entropy_plus_weighted_router_losses() -> None:
    config = config_of({**TOPK, "balance_weight": 0.5, "z_weight": 0.25})
    model = decoder_of(config.model)
    batch, targets = batch_of([[7, 5], [12]])
    output = model(batch, targets)
    logits = model(batch).logits
    ce = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / 24
    extra = sum(0.5 * s["balance_loss"] + 0.25 * s["z_loss"] for s in output.stats.values()) / 24
    assert float(output.loss) == pytest.approx(float(ce + extra), rel=1e-10)
    assert float(output.token_loss.sum() / 24) == pytest.approx(float(ce), rel=1e-6)


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    small, deep = (decoder_of(config_of(num_layers=n).model, torch.float32) for n in (2, 5))
    other = decoder_of(config_of(num_layers=2).model, torch.float32, seed=1)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, deep.state_dict()[name], rtol=0, atol=0, msg=name)
    assert not torch.equal(small.embedding.weight, other.embedding.weight)
    assert float(deep.layers["0"].mlp.experts.gate_up.std()) == pytest.approx(0.02, rel=0.1)


def test_dense_layers_hand_the_state_on() -> None:
    """With one MoE layer the number of dense layers before it does not change the state that its router starts from."""
    model = decoder_of(config_of(RECURRENT, num_layers=2, num_dense_layers=1).model)
    batch, targets = batch_of([[12]])
    output = model(batch, targets)
    assert list(output.stats) == ["1"]
    output.loss.backward()
    assert float(model.shared_router.weight_hh.grad.abs().max()) == 0.0  # the state was still zero


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputation_changes_nothing_but_memory(mode: str, router: dict, shape: dict) -> None:
    config = config_of(router, **shape)
    batch, targets = batch_of([[7, 5], [12]])
    kept, again = decoder_of(config.model), decoder_of(config.model)
    apply_recompute(again, mode)
    sizes = []
    found = []
    for model in (kept, again):
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            output = model(batch, targets)
        output.loss.backward()
        sizes.append(sum(saved.values()))
        found.append((output.loss.detach(), output.stats, gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert sizes[1] < sizes[0]


def test_recomputation_asks_the_router_once() -> None:
    model = decoder_of(config_of(RECURRENT).model)
    apply_recompute(model, "full")
    calls = {"router": 0, "attention": 0, "experts": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for block in model.layers.values():
        block.mlp.router.register_forward_pre_hook(count("router"))
        block.attention.register_forward_pre_hook(count("attention"))
        block.mlp.experts.register_forward_pre_hook(count("experts"))
    batch, targets = batch_of([[12]])
    model(batch, targets).loss.backward()
    assert calls == {"router": 3, "attention": 6, "experts": 6}
