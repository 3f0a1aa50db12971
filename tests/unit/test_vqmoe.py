"""VQMoE against worked examples, loops, and what its published code gets wrong."""

import dataclasses
import math

import pytest
import torch
from models import batch_of, config_of, decoder_of
from routing import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.flops import count_flops
from moe_train.metrics import router_health
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Routing

VQMOE = {"name": "vqmoe"}
KINDS = ["base", "cosine", "ema"]


def make(router: dict | None = None, **model: int) -> MoE:
    config = config_of({**VQMOE, **(router or {})}, **model).model
    found = MoE(config, 0, get_backend("torch")).double()
    initialise(found, 0)
    with torch.no_grad():
        found.experts.down.mul_(50)
        found.experts.gate_up.mul_(20)
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(rows: int, positions: int) -> BatchInfo:
    return batch_of([[positions]] * rows)[0]


def run(layer: MoE, x: Tensor) -> tuple[Tensor, Routing]:
    """The layer's output for rows x [B, S, D], and what was decided."""
    routing = layer.router(x, x.new_zeros(*x.shape[:2], 0), batch(*x.shape[:2]), None)
    return layer.mix(x, routing, layer.plan(routing)), routing


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = layer.experts.gate_up[e].flatten(0, -2).chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ layer.experts.down[e].T


def norm(layer: MoE, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.router.norm_weight, layer.router.norm_bias)


def test_worked_example() -> None:
    """x = (1, 0), e = (0, 1), c = .05."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for form, value, slope in (("official", [0.90, 0.05], 0.95), ("clean", [0.95, 0.05], 1.0)):
        router = make({"straight_through": form, "top_k": 1}, hidden_size=2, num_heads=1, num_experts=1).router
        with torch.no_grad():
            router.codebook.copy_(torch.tensor([[0.0, 1.0]]))
        chosen = router._nearest(x, router.codes())
        q = router.quantise(x, router._codes_of(x, chosen, router.codes()))
        torch.testing.assert_close(q, torch.tensor([value], dtype=torch.float64))
        (grad,) = torch.autograd.grad(q[0, 0], x)
        torch.testing.assert_close(grad, torch.tensor([[slope, 0.0]], dtype=torch.float64))
        losses = router._code_losses(x, chosen, router.codes())
        loss = losses["codebook"] + 0.25 * losses["commitment"]
        assert float(loss.detach()) == pytest.approx(1.25)
        dx, de = torch.autograd.grad(loss, (x, router.codebook))
        torch.testing.assert_close(dx, torch.tensor([[0.25, -0.25]], dtype=torch.float64))
        torch.testing.assert_close(de, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    weights = router.config.loss_weights()
    assert weights["codebook"] == 0.08
    assert weights["commitment"] == pytest.approx(0.25 * 0.08)


@pytest.mark.parametrize(
    "router", [{}, {"top_k": 2, "num_codes": 11}, {"codebook": "cosine"}, {"straight_through": "official"}]
)
def test_the_layer_against_loops(router: dict) -> None:
    """Both branches token by token; code j belongs to expert j mod E."""
    layer = make({"contribution": 0.3, **router})
    part, config = layer.router, layer.router.config
    x = normal(2, 12, 16)
    out, routing = run(layer, x)
    codes = part.codebook
    for t, row in enumerate(x.flatten(0, 1)):
        scores = (F.normalize(part.embedding) @ row).softmax(0).topk(config.top_k)
        continuous = sum(w * expert(layer, int(e), row) for w, e in zip(*scores, strict=True))
        if config.codebook == "cosine":
            j = int(F.cosine_similarity(row[None], codes).argmax())
            code = F.normalize(codes[j], dim=0) * row.norm()
        else:
            j = int((codes - row).square().sum(-1).argmin())
            code = codes[j]
        kept = 1 - 2 * 0.3 if config.straight_through == "official" else 1 - 0.3
        discrete = norm(layer, expert(layer, j % 4, norm(layer, kept * row + 0.3 * code)))
        g = (part.mixer @ row + part.mixer_bias).softmax(0)
        torch.testing.assert_close(out.flatten(0, 1)[t], g[0] * continuous + g[1] * discrete)
        assert int(routing.extra[0][t]) == j
    assert routing.expert_ids.shape == (48, config.top_k)
    assert (routing.expert_ids[24:, 1:] == -1).all()


def test_without_contribution_the_expert_gets_the_row() -> None:
    layer = make({"contribution": 0.0, "branches": "discrete"})
    x = normal(1, 9, 16)
    out, routing = run(layer, x)
    expected = [norm(layer, expert(layer, int(e), norm(layer, row))) for e, row in zip(routing.expert_ids, x[0], strict=True)]
    torch.testing.assert_close(out[0], torch.stack(expected))


def test_a_closed_gate_leaves_one_branch() -> None:
    """b = (inf, -inf) is the plain top-k layer, b = (-inf, inf) the fine-tuning path."""
    both, plain, discrete = make({"top_k": 2}), make({"top_k": 2}), make({"branches": "discrete"})
    x = normal(2, 9, 16)
    with torch.no_grad():
        both.router.mixer_bias.copy_(torch.tensor([1e4, -1e4]))
        routing = plain.router.choose(x, F.normalize(plain.router.embedding), x.new_zeros(2, 9, 0), batch(2, 9))
        expected = plain.experts(x.flatten(0, 1), routing.expert_ids, routing.weights).view_as(x)
        torch.testing.assert_close(run(both, x)[0], expected)
        both.router.mixer_bias.copy_(torch.tensor([-1e4, 1e4]))
        torch.testing.assert_close(run(both, x)[0], run(discrete, x)[0])


def test_one_code_and_one_expert() -> None:
    layer = make({"top_k": 1}, num_experts=1)
    _, routing = run(layer, normal(1, 5, 16))
    assert routing.expert_ids.tolist() == [[0]] * 10


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_centroids_give_voronoi_cells(kind: str) -> None:
    layer = make({"codebook": kind, "num_codes": 7})
    centers = 3 * normal(7, 16, seed=1)
    with torch.no_grad():
        layer.router.codebook.copy_(centers)
    x = centers.repeat(5, 1) + 0.1 * normal(35, 16)
    assert layer.router._nearest(x, layer.router.codes()).tolist() == list(range(7)) * 5


# --- gradients -------------------------------------------------------------------------------------------------------------------


def test_losses_and_task_train_different_parts() -> None:
    layer = make({"top_k": 2})
    out, routing = run(layer, normal(2, 12, 16))
    (out * normal(2, 12, 16, seed=1)).sum().backward(retain_graph=True)
    assert layer.router.codebook.grad is None
    assert all(float(p.grad.abs().max()) > 0 for n, p in layer.named_parameters() if n != "router.codebook")
    layer.zero_grad()
    (routing.losses["codebook"] + routing.losses["commitment"]).backward()
    assert float(layer.router.codebook.grad.abs().max()) > 0
    assert layer.experts.down.grad is None
    assert layer.router.embedding.grad is None


def test_top_one_has_a_gate_gradient() -> None:
    """The released recipe divides the one score by itself, and its gate stays as it was drawn."""
    layer = make({"balance_weight": 0.0})
    out, _ = run(layer, normal(2, 12, 16))
    out.square().sum().backward()
    assert layer.router.config.top_k == 1
    assert float(layer.router.embedding.grad.abs().max()) > 0
    bad = layer.router.config.model_copy(update={"renormalize": True}).conflicts(config_of(VQMOE).model)
    assert [c.path for c in bad] == ["model.router.renormalize"]


def test_the_clean_form_gives_the_row_its_whole_gradient() -> None:
    grads = []
    for form in ("clean", "official"):
        router = make({"straight_through": form, "contribution": 0.2}).router
        x = normal(4, 16).requires_grad_()
        router.quantise(x, normal(4, 16, seed=1)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], torch.ones(4, 16, dtype=torch.float64))
    torch.testing.assert_close(grads[1], torch.full((4, 16), 0.8, dtype=torch.float64))


def test_fine_tuning_trains_experts_and_norm_alone() -> None:
    """Its parameters are some of those of the whole router, so that a checkpoint of it can be taken over."""
    layer, whole = make({"branches": "discrete"}), make()
    out, routing = run(layer, normal(2, 12, 16))
    assert routing.expert_ids.shape == (24, 1)
    assert not routing.losses
    out.mul(normal(2, 12, 16, seed=1)).sum().backward()
    assert {n for n, p in layer.router.named_parameters() if p.grad is not None} == {"norm_weight", "norm_bias"}
    kept, all_names = dict(layer.state_dict()), dict(whole.state_dict())
    assert {n: v.shape for n, v in kept.items()}.items() <= {n: v.shape for n, v in all_names.items()}.items()
    before = layer.router.codebook.clone()
    layer.router.after_step(routing.stats, 0.5)
    assert torch.equal(before, layer.router.codes())
    assert not layer.router.moved.any()


# --- codes over steps ------------------------------------------------------------------------------------------------------------


def test_running_means_against_sums_and_counts() -> None:
    """e = m / N with N and m decayed and added to, over 6 steps; a code that no row chose keeps its place."""
    layer = make({"codebook": "ema", "code_decay": 0.75, "dead_code_share": 0.0, "num_codes": 5})
    router = layer.router
    with torch.no_grad():
        router.codebook[:4].copy_(normal(4, 16, seed=7))
        router.codebook[4].fill_(1e3)
    counts, sums = router.usage.clone(), router.codebook * router.usage[:, None]
    for seed in range(6):
        x = normal(2, 20, 16, seed=seed)
        chosen = router._nearest(x.flatten(0, 1), router.codes())
        _, routing = run(layer, x)
        before = router.codebook.clone()
        member = F.one_hot(chosen, 5).double()
        counts = 0.75 * counts + 0.25 * member.mean(0)
        sums = 0.75 * sums + 0.25 * member.T @ x.flatten(0, 1) / 40
        assert torch.equal(router.codebook, before)  # the forward pass changed nothing
        router.after_step(routing.stats, 0.5)
        torch.testing.assert_close(router.usage, counts)
        torch.testing.assert_close(router.codebook, sums / counts[:, None])
    assert torch.equal(router.codebook[4], torch.full((16,), 1e3, dtype=torch.float64))
    assert "codebook" not in dict(router.named_parameters())
    assert "codebook" not in routing.losses


def step_until_moved(layer: MoE, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Steps with a dead code 0 until it is moved: the code and the rows of that step."""
    router = layer.router
    for step in range(steps):
        x = normal(2, 16, 16, seed=step).abs()
        info = dataclasses.replace(batch(2, 16), step=step)
        routing = router(x, x.new_zeros(2, 16, 0), info, None)
        before = router.usage[0].clone()
        router.after_step(routing.stats, 0.5)
        if router.usage[0] > before:
            return router.codes()[0].detach(), x.flatten(0, 1)
    raise AssertionError("the dead code was never moved")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_code_moves_onto_a_row_of_the_step(kind: str) -> None:
    layer = make({"codebook": kind, "num_codes": 6, "code_decay": 0.5})
    with torch.no_grad():
        layer.router.codebook.copy_(normal(6, 16, seed=3).abs())
        layer.router.codebook[0] = -1e3  # far from every row, in angle too
    kept = layer.router.codebook[1:].clone()
    code, rows = step_until_moved(layer)
    rows = F.normalize(rows) if kind == "cosine" else rows
    assert float((rows - code).abs().amax(-1).min()) < 1e-9
    assert float(layer.router.usage[0]) == pytest.approx(1 / 6)
    if kind != "ema":
        assert torch.equal(kept, layer.router.codebook[1:])
        assert not layer.router.moved[1:].any()


def test_codes_move_only_where_that_is_wanted_and_in_training() -> None:
    cases = ({"dead_code_share": 0.0}, True, False), ({}, False, False), ({}, True, True), ({"frozen": True}, True, False)
    for router, train, expected in cases:
        layer = make(router).train(train)
        assert ("code_samples" in run(layer, normal(1, 8, 16))[1].stats) == expected


def test_frozen_running_means_stay() -> None:
    layer = make({"codebook": "ema", "frozen": True})
    before = layer.router.codebook.clone()
    layer.router.after_step(run(layer, normal(1, 8, 16))[1].stats, 0.5)
    assert torch.equal(before, layer.router.codebook)


def test_samples_are_one_row_per_code_and_step_on_average() -> None:
    router = make({"num_codes": 8}).router
    x, counts = torch.zeros(64, 16, 16, dtype=torch.float64), torch.zeros(8)
    for step in range(50):
        info = dataclasses.replace(batch(64, 16), step=step)
        counts += router._code_stats(x.flatten(0, 1), torch.zeros(1024, dtype=torch.int64), info)["code_samples"]
    assert float(counts.mean() / 50) == pytest.approx(1.0, abs=0.15)
    assert float(counts.min()) > 25


def test_statistics_do_not_depend_on_micro_batches() -> None:
    """The rows of a step in one micro-batch or in two; the sampled rows too."""
    layer = make({"codebook": "ema"})
    x, info = normal(4, 8, 16), batch(4, 8)
    whole = layer.router(x, x.new_zeros(4, 8, 0), info, None).stats
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        names = ("tokens", "positions", "doc_ids", "labels", "rows")
        half = dataclasses.replace(info, segments=None, **{n: getattr(info, n)[part] for n in names})
        parts.append(layer.router(x[part], x.new_zeros(len(x[part]), 8, 0), half, None).stats)
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_statistics_do_not_depend_on_ranks_that_share_rows() -> None:
    part, info, x = make({"codebook": "ema"}).router, batch(2, 12), normal(2, 12, 16)
    positions = torch.tensor([[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]])
    whole = part(x, x.new_zeros(2, 12, 0), info, None).stats
    found = on_ranks(positions, info, lambda b: part(b.here(x), x.new_zeros(2, 6, 0), b, None).stats)
    assert whole["code_samples"].any()
    torch.testing.assert_close({name: found[0][name] + found[1][name] for name in whole}, whole)


# --- in a model ------------------------------------------------------------------------------------------------------------------


def test_flops_count_both_branches() -> None:
    def count(router: dict) -> tuple[int, int]:
        flops = count_flops(config_of({**VQMOE, **router}).model, 32)
        return flops.experts, flops.router

    one_expert = 3 * 3 * 16 * 8  # three layers, three matrices
    assert count({}) == (2 * one_expert, 3 * 16 * (4 + 2 + 4))
    assert count({"codebook": "ema"}) == count({})
    assert count({"top_k": 3}) == (4 * one_expert, 3 * 16 * (4 + 2 + 4))
    assert count({"branches": "discrete"}) == (one_expert, 3 * 16 * 4)


def test_code_entropy_is_reported() -> None:
    stats = {
        "0": {"tokens_per_expert": torch.tensor([4, 4]), "tokens_per_code": torch.tensor([2, 2, 2, 2])},
        "1": {"tokens_per_expert": torch.tensor([4, 4]), "tokens_per_code": torch.tensor([0, 8, 0, 0])},
        "2": {"tokens_per_expert": torch.tensor([4, 4]), "code_sums": torch.ones(4, 3)},
    }
    health = router_health(stats, 8)
    assert health["layers"]["0"]["code_entropy"] == pytest.approx(math.log(4), rel=1e-5)
    assert health["code_entropy"] == 0.0
    assert "code_sums" not in health["layers"]["2"]


@pytest.mark.parametrize("router", [{}, {"codebook": "ema", "top_k": 2}, {"codebook": "cosine"}, {"branches": "discrete"}])
def test_training_lowers_the_loss(router: dict) -> None:
    model = decoder_of(config_of({**VQMOE, **router}).model, torch.float32)
    info, targets = batch_of([[9, 7], [16]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(30):
        output = model(dataclasses.replace(info, step=step), targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, block in model.layers.items():
            block.mlp.router.after_step(output.stats[name], 0.5)
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(isinstance(p, nn.Parameter) and p.isfinite().all() for p in model.parameters())
