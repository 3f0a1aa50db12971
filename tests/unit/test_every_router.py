"""What holds for every registered router, whoever wrote it. A new router is in here by being registered.

tests/distributed/test_router_runs.py trains each of them with the engine.

SMALL sizes a router for these tiny models, VARIANTS are further settings that change what it does. Settings with which a token sees
what it must not (`leaks()`) are in LEAKING, and must be caught.
"""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import pytest
import torch
from models import TINY, batch_of, config_of, decoder_of, make_batch
from routing import on_ranks
from torch import Tensor, nn

from moe_train import routers
from moe_train.config import ModelConfig, ParallelSection
from moe_train.errors import UserError
from moe_train.model.decoder import Decoder
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Router, Routing
from moe_train.parallel.recompute import apply_recompute
from moe_train.routers.hash import HashRouter

Settings = dict[str, Any]
SMALL: dict[str, Settings] = {
    "recurrent": {"router_size": 8},
    "mlp": {"router_size": 8},
    "xmoe": {"router_size": 4},
    "hypermoe": {"hyper_size": 8},
    "stablemoe": {"word_size": 4},
    "smear": {"segment_size": 3},
}
VARIANTS: list[Settings] = [
    {"name": "topk", "num_groups": 2, "scores": "sigmoid", "z_weight": 0.01},
    {"name": "recurrent", "router_size": 8, "passing": "none", "residual": 0.5},
    {"name": "recurrent", "router_size": 8, "residual": 1.0, "cell": "lstm", "projector": "shared"},
    {"name": "recurrent", "router_size": 8, "scoring": "cosine", "cosine_size": 4},
    {"name": "recurrent", "router_size": 8, "frozen": True, "frozen_cell": True},
    {"name": "aux_free", "num_groups": 2, "bias_rate": 0.1},
    {"name": "acmoe", "mix_weights": True, "scoring": "linear", "skip_connect": 0.25},
    {"name": "vqmoe", "codebook": "ema", "top_k": 2},
    {"name": "reinforce", "segment_size": 3},
]
NAMES = sorted(routers.registry())
CASES = [{"name": name, **SMALL.get(name, {})} for name in NAMES] + VARIANTS
LEAKING = [
    {"name": n, **SMALL.get(n, {}), "causal": False} for n, kind in routers.registry().items() if "causal" in kind.model_fields
]
UNUSED = {"passing": ("weight_hh",)}  # setting -> parameters that it leaves without a gradient
DOCUMENTS = [[5, 8, 1], [14]]
ZIGZAG = torch.tensor([[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]])  # what four ranks hold of a row
EDGES = (0, 2, 3, 5, 8, 12, 13)  # of documents and of the segments inside


def title(case: Settings) -> str:
    return "-".join(
        str(v) if k == "name" else f"{k}={v}" for k, v in case.items() if k == "name" or k not in SMALL.get(case["name"], {})
    )


def axis_allowed(case: Settings, **axes: int) -> bool:
    return not config_with(tuple(case.items())).router.layout_conflicts(ParallelSection(**axes))


every_case = pytest.mark.parametrize("case", CASES, ids=title)
leaking_cases = pytest.mark.parametrize("case", LEAKING, ids=title)


@functools.cache
def config_with(settings: tuple[tuple[str, Any], ...], layers: int = TINY["num_layers"]) -> ModelConfig:
    return config_of(dict(settings), num_layers=layers).model


def model_of(case: Settings, layers: int = TINY["num_layers"], **options: Any) -> Decoder:
    return decoder_of(config_with(tuple(case.items()), layers), **options)


def has_key(case: Settings, key: str) -> bool:
    return key in routers.registry()[case["name"]].model_fields


def routers_of(model: Decoder) -> dict[str, Router]:
    return {name: block.mlp.router for name, block in model.layers.items()}


def finish_step(model: Decoder, batch: BatchInfo, targets: Tensor, progress: float = 0.5) -> None:
    """What the engine does after an optimizer step, twice: buffers are then no longer what they start from.

    ACMoE routes by its clusters after the second step.
    """
    training = model.training
    for _ in range(2):
        stats = model.train()(batch, targets).stats
        for name, router in routers_of(model).items():
            router.after_step(stats[name], progress)
    model.train(training)


def watch(model: Decoder) -> list[tuple[Router, tuple, Routing]]:
    """Filled by each forward pass: every router with what it got and what it decided."""
    seen: list[tuple[Router, tuple, Routing]] = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda module, args, out: seen.append((module, args, out)))
    return seen


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def test_leaks_are_declared_where_they_are() -> None:
    assert not [case for case in CASES if config_with(tuple(case.items())).leaks()]
    assert not [case for case in LEAKING if not config_with(tuple(case.items())).leaks()]


# Shapes, purity, determinism


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shapes_and_dtypes(case: Settings, dtype: torch.dtype) -> None:
    """In 16 bits as the engine runs it: routers, and what they share, stay in fp32."""
    model = model_of(case, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for module in [*routers_of(model).values(), model.shared_router]:
        if module is not None:
            module.to(wide)
    seen = watch(model)
    batch, targets = batch_of(DOCUMENTS)
    output = model(batch, targets)
    output.loss.backward()
    assert len(seen) == TINY["num_layers"]
    for router, (x, state, *_), routing in seen:
        tokens = x.shape[0] * x.shape[1]
        assert (x.dtype, state.dtype) == (dtype, wide)
        assert routing.expert_ids.dtype == torch.int32
        assert int(routing.expert_ids.min()) >= -1
        assert int(routing.expert_ids.max()) < TINY["num_experts"]
        assert routing.weights.shape == routing.expert_ids.shape
        assert routing.weights.dtype == wide
        assert routing.weights.shape[0] % tokens == 0
        assert routing.weights.isfinite().all()
        assert (routing.state.shape, routing.state.dtype) == (state.shape, wide)
        assert routing.losses.keys() <= router.config.loss_weights().keys()
        for value in routing.losses.values():
            assert (value.shape, value.dtype) == ((), wide)
        assert routing.stats["tokens_per_expert"].shape == (TINY["num_experts"],)
        assert not any(value.requires_grad for value in routing.stats.values())
    assert output.carry.hidden.dtype == dtype
    assert output.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_changes_nothing(case: Settings, training: bool) -> None:
    model = model_of(case).train(training)
    batch, targets = batch_of(DOCUMENTS)
    before, attributes = digest(model), [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    model(batch, targets).loss.backward()
    model(batch)
    assert digest(model) == before
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes


@every_case
def test_the_same_step_gives_the_same_bits(case: Settings) -> None:
    batch, targets = batch_of(DOCUMENTS)
    found = []
    for _ in range(2):
        model = model_of(case, dtype=torch.float32)
        seen = watch(model)
        output = model(batch, targets)
        output.loss.backward()
        found.append((output.loss.detach(), output.stats, gradients(model), [routing.expert_ids for *_, routing in seen]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@every_case
def test_the_reference_kernels_agree(case: Settings) -> None:
    batch, targets = batch_of(DOCUMENTS)
    found = []
    for backend in ("reference", "torch"):
        model = model_of(case, backend=backend)
        output = model(batch, targets)
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)


@every_case
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(case: Settings, mode: str) -> None:
    batch, targets = batch_of(DOCUMENTS)
    found = []
    for recompute in ("none", mode):
        model = model_of(case)
        apply_recompute(model, recompute)
        output = model(batch, targets)
        output.loss.backward()
        found.append((output.loss.detach(), output.stats, gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# Gradients and losses


balanced_cases = pytest.mark.parametrize("case", [case for case in CASES if has_key(case, "balance_weight")], ids=title)


@every_case
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_gradient_reaches_every_trainable_parameter(case: Settings, top_k: int | None) -> None:
    """With one expert too: renormalised, its weight would be 1 whatever the router says."""
    if top_k is not None:
        case = {**case, "top_k": 1} | ({"renormalize": False} if has_key(case, "renormalize") else {})
    try:
        model = model_of(case)
    except UserError as error:
        pytest.skip(f"this router has no top_k=1: {error}")
    batch, targets = batch_of(DOCUMENTS)
    model(batch, targets).loss.backward()
    unused = tuple(name for key in case for name in UNUSED.get(key, ()))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif not name.endswith(unused or ("no name",)):
            assert p.grad is not None, name
            assert float(p.grad.abs().max()) > 0, name


@balanced_cases
def test_balance_loss_at_uniform_routing(case: Settings) -> None:
    """With all parameters zero every expert has the same score, and a token's loss is 1."""
    model = model_of({**case, "balance_weight": 1.0})
    for module in [*routers_of(model).values(), model.shared_router]:
        for p in module.parameters() if module is not None else ():
            nn.init.zeros_(p)
    seen = watch(model)
    batch, targets = batch_of(DOCUMENTS)
    model(batch, targets)
    for *_, routing in seen:
        assert float(routing.losses["balance"].detach()) / batch.tokens.numel() == pytest.approx(1.0, abs=1e-9)


@balanced_cases
def test_balance_gradient_points_away_from_overload(case: Settings) -> None:
    """A step down the balance loss lowers the share that the scores give to the overloaded expert.

    All experts are chosen, so that the weights are the scores; x moves too, which is all that a frozen gate leaves.
    """
    experts = {"top_k": TINY["num_experts"], "renormalize": False, "top_groups": case.get("num_groups", 1)}
    model = model_of({**case, **experts, "balance_weight": 1.0, "balance_scope": "global_batch"})
    router = routers_of(model)["0"]
    router.fractions.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]))
    batch, _ = batch_of(DOCUMENTS)
    x = torch.randn(2, 14, TINY["hidden_size"], dtype=torch.float64, requires_grad=True)
    routing = router(x, torch.zeros(2, 14, model.state_size, dtype=torch.float64), batch, model.shared_router)
    weights, ids = routing.weights[:28], routing.expert_ids[:28].long()  # a second branch's rows come after
    share = (weights / weights.sum(-1, keepdim=True)).gather(1, (ids == 0).int().argmax(-1, keepdim=True)).sum()
    moved = [x, *(p for p in router.parameters() if p.requires_grad)]
    down, up = (
        torch.autograd.grad(value, moved, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (routing.losses["balance"], share)
    )
    assert sum(float((a * b).sum()) for a, b in zip(down, up, strict=True)) > 0


# Causality


def logits_with(model: Decoder, batch: BatchInfo, row: int, position: int) -> Tensor:
    """Row 0's logits with another token at a place."""
    tokens = batch.tokens.clone()
    tokens[row, position] = (tokens[row, position] + 1) % TINY["vocab_size"]
    return model(make_batch(tokens, batch.positions, batch.doc_ids)).logits[0]


def ahead(case: Settings, training: bool, later: bool = False, seed: int = 0) -> tuple[bool, bool]:
    """Whether a token changed anything before it or in another document; and whether it changed everything that it may."""
    model = model_of(case, layers=2).train(training)
    batch, targets = batch_of(DOCUMENTS, seed)
    if later:
        finish_step(model, batch, targets)
    before, leaked, followed = model(batch).logits[0], False, True
    for position in EDGES:
        end = next(end for end in (5, 13, 14) if position < end)
        # A row's place in its expert's matrix product rounds differently.
        changed = (logits_with(model, batch, 0, position) - before).abs().amax(-1) > 1e-12
        leaked |= bool(changed[:position].any() or changed[end:].any())
        followed &= bool(changed[position:end].all())
    return leaked, followed


@every_case
@pytest.mark.parametrize(("training", "later"), [(True, False), (True, True), (False, True)])
def test_a_token_changes_no_earlier_token_and_no_other_document(case: Settings, training: bool, later: bool) -> None:
    assert ahead(case, training, later) == (False, True)


@leaking_cases
def test_a_leak_is_found(case: Settings) -> None:
    """A router that chooses one expert leaks only where the choice changes, so that it may take several rows."""
    assert any(ahead(case, training=False, seed=seed)[0] for seed in range(20))


def mixes_rows(case: Settings) -> bool:
    """Whether another sequence of the batch changes a row's logits."""
    model = model_of(case, layers=2)
    batch, targets = batch_of(DOCUMENTS)
    finish_step(model, batch, targets)
    before = model(batch).logits[0]
    return any(bool(((logits_with(model, batch, 1, p) - before).abs() > 1e-12).any()) for p in (0, 7, 13))


@every_case
def test_other_sequences_change_nothing(case: Settings) -> None:
    assert not mixes_rows(case)


@leaking_cases
def test_what_leaks_says_of_other_rows_is_so(case: Settings) -> None:
    assert mixes_rows(case) == any("other rows" in leak for leak in config_with(tuple(case.items())).leaks())


@every_case
def test_a_prefix_gives_the_same_logits(case: Settings) -> None:
    """As decoding sees it: what comes later is not there yet."""
    model = model_of(case, layers=2).eval()
    batch, targets = batch_of(DOCUMENTS)
    finish_step(model, batch, targets)
    whole = model(batch).logits
    for n in (1, 3, 4, 6, 9, 13):
        part = make_batch(batch.tokens[:, :n], batch.positions[:, :n], batch.doc_ids[:, :n])
        torch.testing.assert_close(model(part).logits, whole[:, :n], rtol=0, atol=1e-12)


def layer_parts(model: Decoder, layer: str, batch: BatchInfo) -> tuple[MoE, Tensor, Tensor]:
    """A layer with experts of its own weight, normal hidden rows, and the state that the layer before gives for them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*batch.tokens.shape, TINY["hidden_size"], dtype=torch.float64, generator=generator)
    state = torch.zeros(*x.shape[:2], model.state_size, dtype=torch.float64)
    for name in range(int(layer)):
        state = routers_of(model)[str(name)](x, state, batch, model.shared_router).state
    return model.layers[layer].mlp, x, state.detach()


def decide(layer: MoE, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: Any = None) -> tuple:
    routing = layer.router(x, state, batch, shared, memory)
    return layer.mix(x, routing, layer.plan(routing)), routing


@pytest.mark.parametrize("case", [*CASES, *LEAKING], ids=title)
def test_ranks_that_share_rows_decide_the_same(case: Settings) -> None:
    """Outputs and state at their positions; losses and statistics in the sum."""
    if not axis_allowed(case, cp=4):
        pytest.skip("this router refuses context parallelism")
    model = model_of(case)
    batch, targets = batch_of([[5, 10, 1], [16]])
    finish_step(model, batch, targets)
    layer, x, state = layer_parts(model, "1", batch)
    whole, routing = decide(layer, x, state, batch, model.shared_router)

    def share(part: BatchInfo) -> tuple:
        return decide(layer, part.here(x), part.here(state), part, model.shared_router)

    found = on_ranks(ZIGZAG, batch, share)
    for (out, one), places in zip(found, ZIGZAG, strict=True):
        torch.testing.assert_close(out, whole[:, places], rtol=0, atol=1e-12)
        torch.testing.assert_close(one.state, routing.state[:, places], rtol=0, atol=1e-12)
    for kind in ("losses", "stats"):
        for name, value in getattr(routing, kind).items():
            total = sum(getattr(one, kind)[name] for _, one in found)
            torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-12, msg=name)


@every_case
def test_decoding_in_chunks_gives_the_same(case: Settings) -> None:
    """What a router remembers of earlier tokens is enough."""
    model = model_of(case)
    batch, targets = batch_of([[5, 10, 1], [16]])
    finish_step(model, batch, targets)
    layer, x, state = layer_parts(model.eval(), "1", batch)
    whole, _ = decide(layer, x, state, batch, model.shared_router)
    memory, start = None, 0
    for n in (4, 1, 1, 7, 3):
        part = slice(start, start + n)
        names = ("tokens", "positions", "doc_ids", "labels")
        chunk = dataclasses.replace(batch, **{name: getattr(batch, name)[:, part] for name in names})
        out, routing = decide(layer, x[:, part].contiguous(), state[:, part], chunk, model.shared_router, memory)
        torch.testing.assert_close(out, whole[:, part], rtol=0, atol=1e-12)
        memory, start = routing.memory, start + n


def random_token_loss(model: Decoder, steps: int = 200) -> float:
    """Mean loss of the last 50 steps of training on tokens that nothing predicts; each step draws new ones."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        batch, targets = batch_of([[9, 11], [20], [20], [4, 16]] * 2, seed=step + 1)
        batch = dataclasses.replace(batch, step=step)
        output = model(batch, targets)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        for name, router in routers_of(model).items():
            router.after_step(output.stats[name], (step + 1) / steps)
        losses.append(float(output.token_loss.sum() / (targets >= 0).sum()))
    return sum(losses[-50:]) / 50


@pytest.mark.slow
@every_case
def test_random_tokens_stay_unpredictable(case: Settings) -> None:
    assert random_token_loss(model_of(case, dtype=torch.float32)) > math.log(TINY["vocab_size"]) - 0.01


@pytest.mark.slow
def test_a_router_that_looks_ahead_predicts_random_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's own test: the next token's expert says which quarter of the vocabulary it is in."""
    honest = HashRouter.forward

    def peek(self: HashRouter, x: Tensor, state: Tensor, batch: BatchInfo, *rest: Any) -> Routing:
        return honest(self, x, state, dataclasses.replace(batch, tokens=batch.tokens.roll(-1, 1)), *rest)

    monkeypatch.setattr(HashRouter, "forward", peek)
    assert random_token_loss(model_of({"name": "hash"}, dtype=torch.float32)) < math.log(TINY["vocab_size"]) - 0.1
