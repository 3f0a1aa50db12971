"""ACMoE against worked examples, loops, and what its published code gets wrong."""

from collections.abc import Callable

import pytest
import torch
from models import batch_of, config_of, decoder_of
from routing import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train.model.init import initialise
from moe_train.model.routing import BatchInfo, Routing
from moe_train.routers import acmoe
from moe_train.routers.acmoe import ACMoERouter, feature_weights, pair_differences

ACMOE = {"name": "acmoe"}
PUBLISHED = {**ACMOE, "causal": False}
NAN = float("nan")


def make(router: dict, layer: int = 1, **model: int) -> ACMoERouter:
    config = config_of(router, **model).model
    found = ACMoERouter(config.router, config, layer, get_backend("torch")).double()
    initialise(found, 0)
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(labels: Tensor) -> Tensor:
    """The state that says that these experts [T] were chosen first."""
    return (labels + 1).double().view(1, -1, 1)


def batch(rows: int, positions: int) -> BatchInfo:
    return batch_of([[positions]] * rows)[0]


def route(router: ACMoERouter, x: Tensor, labels: Tensor) -> Routing:
    """One row of tokens x [T, D]."""
    return router(x[None], labelled(labels), batch(1, len(x)), None)


def spread(x: Tensor, labels: Tensor, kind: Callable[[Tensor], Tensor], experts: int) -> Tensor:
    """`kind` of each cluster's tokens, [E, D]; NaN for a cluster of fewer than two."""
    clusters = [x[labels == e] for e in range(experts)]
    return torch.stack([kind(c) if len(c) > 1 else torch.full_like(x[0], NAN) for c in clusters])


def mad(c: Tensor) -> Tensor:
    return (c - c.mean(0)).abs().mean(0)


def published_weights(x: Tensor, labels: Tensor, experts: int) -> Tensor:
    """The released recipe with loops, clusters of fewer than two tokens left out: [E, D]."""
    w = 1 / (spread(x, labels, mad, experts) + 1e-4)
    w = w.minimum(10 * w.nanmean())
    w = w / w.nanmean(0, keepdim=True)
    return torch.where(w.isnan(), 1.0, w)


TINY = torch.tensor([[0, 0], [2, 4], [0, 0], [4, 1]], dtype=torch.float64)
TINY_WEIGHTS = [[1.333311, 0.400048], [0.666689, 1.599952]]


@pytest.mark.parametrize(
    ("labels", "live"), [([0, 0, 1, 1], [0, 1]), ([0, 0, 2, 2], [0, 2]), ([3, 3, 1, 1], [3, 1])], ids=["", "empty", "renamed"]
)
def test_worked_example(labels: list[int], live: list[int]) -> None:
    """Deviations (1, 2) and (2, .5). Published code gives (.0003, .00015) for the first cluster where the one between is empty."""
    router = make(PUBLISHED, hidden_size=2, num_heads=1)
    sums = router._measure(TINY[None], labelled(torch.tensor(labels))[..., 0].long(), batch(1, 4))
    dispersions = sums["cluster_deviations"] / sums["cluster_counts"].clamp_min(1)[:, None]
    torch.testing.assert_close(dispersions[live], torch.tensor([[1, 2], [2, 0.5]], dtype=torch.float64))
    weights = feature_weights(dispersions, sums["cluster_counts"] >= 2, "mad")
    torch.testing.assert_close(weights[live], torch.tensor(TINY_WEIGHTS, dtype=torch.float64), rtol=0, atol=1e-6)
    others = [e for e in range(4) if e not in live]
    assert torch.equal(weights[others], torch.ones(2, 2, dtype=torch.float64))


def test_a_lone_token_is_no_cluster() -> None:
    """The published code would divide by 1e-4 for labels 0, 0, 1, 2."""
    router = make(PUBLISHED, hidden_size=2, num_heads=1)
    weights, _ = router._adapt(TINY[None], labelled(torch.tensor([0, 0, 1, 2])), batch(1, 4))
    torch.testing.assert_close(weights, torch.ones_like(weights))  # one cluster: each feature over its mean over clusters


def test_no_cluster_at_all() -> None:
    weights = feature_weights(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), "mad")
    assert torch.equal(weights, torch.ones(3, 2))


def test_clip_at_ten_times_the_mean() -> None:
    dispersions = torch.ones(24, 1, dtype=torch.float64)
    dispersions[0] = 1e-3
    weights = feature_weights(dispersions, torch.ones(24, dtype=torch.bool), "mad")
    raw = 1 / (dispersions + 1e-4)
    clipped = raw.minimum(10 * raw.mean())
    assert float(clipped[0]) < float(raw[0])
    torch.testing.assert_close(weights, clipped / clipped.mean(0))


@pytest.mark.parametrize("kind", ["mad", "variance", "pairwise"])
def test_dispersions_against_loops(kind: str) -> None:
    x, labels = normal(40, 16), torch.arange(40) % 3
    labels[7] = 3  # a cluster of one token
    x[::5] = x[0]  # ties
    naive = {
        "mad": mad,
        "variance": lambda c: c.var(0, unbiased=False),
        "pairwise": lambda c: torch.stack([(a - b).abs() for i, a in enumerate(c) for b in c[:i]]).mean(0),
    }[kind]
    router = make({**PUBLISHED, "dispersion": kind})
    weights, _ = router._adapt(x[None], labelled(labels), batch(1, 40))
    expected = 1 / (spread(x, labels, naive, 4) + {"mad": 1e-4, "variance": 0.1, "pairwise": 1e-4}[kind])
    if kind == "mad":
        expected = published_weights(x, labels, 4)
    expected = torch.where(expected.isnan(), 1.0, expected)
    torch.testing.assert_close(weights[0], expected[labels])


@pytest.mark.parametrize("kind", ["mad", "variance", "pairwise"])
def test_dispersions_do_not_see_a_shift(kind: str) -> None:
    x, labels = normal(40, 16), torch.arange(40) % 4
    router = make({**PUBLISHED, "dispersion": kind})
    one, two = (router._adapt(y[None], labelled(labels), batch(1, 40))[0] for y in (x, x + 5))
    torch.testing.assert_close(one, two)


def test_weights_are_relative_between_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = normal(40, 16), torch.arange(40) % 4
    router = make(PUBLISHED)
    weights, _ = router._adapt(x[None], labelled(labels), batch(1, 40))
    torch.testing.assert_close(weights[0, :4].mean(0), torch.ones(16, dtype=torch.float64))  # one token of each cluster
    monkeypatch.setitem(acmoe.OFFSETS, "mad", 0.0)
    plain, _ = router._adapt(x[None], labelled(labels), batch(1, 40))
    scale = torch.linspace(0.5, 2, 16, dtype=torch.float64)  # no weight comes near the clip
    scaled, _ = router._adapt(x[None] * scale, labelled(labels), batch(1, 40))
    torch.testing.assert_close(plain, scaled)


def test_equally_tight_clusters_change_nothing() -> None:
    block = normal(10, 16)
    x = torch.cat([block + i for i in range(4)])
    labels = torch.arange(4).repeat_interleave(10)
    adaptive, plain = make(PUBLISHED), make(PUBLISHED, layer=0)
    one, two = route(adaptive, x, labels), route(plain, x, labels)
    assert torch.equal(one.expert_ids, two.expert_ids)
    torch.testing.assert_close(one.weights, two.weights)


@pytest.mark.parametrize("scoring", ["direction", "linear"])
@pytest.mark.parametrize("mix", [False, True])
def test_published_recipe(mix: bool, scoring: str) -> None:
    """Scores, choice and weights against the released formulas."""
    x, ids = normal(48, 16), torch.stack([torch.arange(48) % 4, (torch.arange(48) + 1) % 4], 1)
    shares = normal(48, 2, seed=1).softmax(-1)
    router = make({**PUBLISHED, "mix_weights": mix, "scoring": scoring})
    state = torch.cat([ids + 1.0, shares], -1)[None] if mix else labelled(ids[:, 0])
    if scoring == "linear":
        router.bias.data = normal(4, seed=2)
    routing = router(x[None], state, batch(1, 48), None)
    table = published_weights(x, ids[:, 0], 4)
    w = (table[ids] * shares[..., None]).sum(1) if mix else table[ids[:, 0]]
    scores = (x * w) @ F.normalize(router.embedding).T
    if scoring == "linear":
        scores = (x * w) @ router.embedding.T + router.bias
    top = scores.topk(2)
    assert torch.equal(routing.expert_ids.long(), top.indices)
    torch.testing.assert_close(routing.weights, top.values.softmax(-1))
    assert torch.equal(routing.state[0, :, 0], top.indices[:, 0] + 1.0)
    if mix:
        assert torch.equal(routing.state[0, :, :2], top.indices + 1.0)
        torch.testing.assert_close(routing.state[0, :, 2:], top.values.softmax(-1))


@pytest.mark.parametrize("mix", [False, True])
def test_statistics_of_rows_and_of_those_of_the_layer_before(mix: bool) -> None:
    """The released code's `skip_connect`: .75 and .25; the scores are of the rows alone."""
    keys = {**PUBLISHED, "skip_connect": 0.25, "mix_weights": mix}
    first, second = make(keys, layer=0), make(keys)
    before, x = normal(1, 48, 16, seed=3), normal(1, 48, 16)
    columns = second.state_size_of(second.config, config_of(keys).model)
    state = first(before, x.new_zeros(1, 48, columns), batch(1, 48), None).state
    assert torch.equal(state[..., columns - 16 :], before)
    routing = second(x, state, batch(1, 48), None)
    assert torch.equal(routing.state[..., columns - 16 :], x)
    labels = state[0, :, 0].long() - 1
    table = published_weights(0.75 * x[0] + 0.25 * before[0], labels, 4)
    w = table[labels]
    if mix:
        ids, shares = (part[0] for part in state[..., :4].chunk(2, -1))
        w = (table[ids.long() - 1] * shares[..., None]).sum(1)
    top = ((x[0] * w) @ F.normalize(second.embedding).T).topk(2)
    assert torch.equal(routing.expert_ids.long(), top.indices)
    torch.testing.assert_close(routing.weights, top.values.softmax(-1))


def test_tokens_can_change_places() -> None:
    x, labels, order = normal(40, 16), torch.arange(40) % 4, torch.randperm(40, generator=torch.Generator().manual_seed(0))
    router = make(PUBLISHED)
    one, two = route(router, x, labels), route(router, x[order], labels[order])
    assert torch.equal(one.expert_ids[order], two.expert_ids)
    torch.testing.assert_close(one.weights[order], two.weights)


def test_statistics_have_no_gradient() -> None:
    """The gradient of x is that of the scores with the weights held fixed."""
    x, labels = normal(40, 16).requires_grad_(), torch.arange(40) % 4
    router = make(PUBLISHED)
    routing = route(router, x, labels)
    (routing.weights[:, 0] * normal(40, seed=1)).sum().backward()
    w = published_weights(x.detach(), labels, 4)[labels]
    y = x.detach().clone().requires_grad_()
    weights = ((y * w) @ F.normalize(router.embedding.detach()).T).topk(2).values.softmax(-1)
    (weights[:, 0] * normal(40, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not routing.state.requires_grad


def test_initial_embedding_is_orthogonal() -> None:
    embedding = make(ACMOE).embedding
    torch.testing.assert_close(embedding @ embedding.T, torch.eye(4).double() * 0.32**2, rtol=0, atol=1e-7)


# --- the causal form -------------------------------------------------------------------------------------------------------------


def test_kept_statistics_by_hand() -> None:
    router = make({**ACMOE, "momentum": 0.75}, hidden_size=2, num_heads=1)
    x, labels = TINY.repeat(2, 1), torch.tensor([0, 0, 1, 1, 0, 0, 1, 3])  # cluster 3 has one token, cluster 2 none
    means = torch.tensor([[1, 2], [4 / 3, 1 / 3]], dtype=torch.float64)

    def step(y: Tensor) -> dict[str, Tensor]:
        routing = route(router, y, labels)
        router.after_step(routing.stats, 0.5)
        return routing.stats

    step(x)
    assert router.updates.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(router.means[:2], means)
    step(x + 1)
    assert router.updates.tolist() == [2, 2, 0, 0]
    torch.testing.assert_close(router.means[:2], means + 0.25)
    around_old = torch.stack(
        [(x + 1 - means[c])[labels == c].abs().mean(0) for c in (0, 1)]
    )  # deviations from the mean kept before
    torch.testing.assert_close(router.dispersions[:2], around_old)
    step(x)
    around_old = torch.stack([(x - means[c] - 0.25)[labels == c].abs().mean(0) * 0.25 for c in (0, 1)]) + 0.75 * around_old
    torch.testing.assert_close(router.dispersions[:2], around_old)
    assert not router.means[2:].any()
    assert not router.dispersions[2:].any()


@pytest.mark.parametrize("kind", ["mad", "variance", "pairwise"])
def test_kept_statistics_come_to_be_the_published_ones(kind: str) -> None:
    """On activations that do not change, and nearly so on samples of one distribution."""
    causal, published = make({**ACMOE, "dispersion": kind}), make({**PUBLISHED, "dispersion": kind})
    labels = torch.arange(400) % 4
    scale = normal(4, 16, seed=9).exp()[labels]
    x = normal(400, 16) * scale
    for _ in range(3):
        before = route(causal, x, labels)
        causal.after_step(before.stats, 0.5)
    found = causal._adapt(x[None], labelled(labels), batch(1, 400))[0]
    expected = published._adapt(x[None], labelled(labels), batch(1, 400))[0]
    torch.testing.assert_close(found, expected)
    for seed in range(30):
        causal.after_step(route(causal, normal(400, 16, seed=seed) * scale, labels).stats, 0.5)
    found = causal._adapt(x[None], labelled(labels), batch(1, 400))[0]
    gap = float((found / expected).log().abs().mean())
    assert gap < {"mad": 0.06, "variance": 0.12, "pairwise": 0.06}[kind]


@pytest.mark.parametrize("dispersion", ["mad", "variance", "pairwise"])
def test_statistics_are_taken_in_training_alone(dispersion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and decoding use those that are kept; the published form needs its own of every micro-batch."""
    causal, published = (make({**form, "dispersion": dispersion}) for form in (ACMOE, PUBLISHED))
    x, labels = normal(40, 16), torch.arange(40) % 4
    for seed in range(3):
        causal.after_step(route(causal, normal(40, 16, seed=seed), labels).stats, 0.5)
    training = {router: route(router, x, labels) for router in (causal, published)}
    assert {"cluster_counts", "cluster_deviations"} <= training[causal].stats.keys()
    torch.testing.assert_close(route(published.eval(), x, labels).weights, training[published].weights, rtol=0, atol=0)
    monkeypatch.setattr(causal, "_measure", None)  # is not called
    evaluated = route(causal.eval(), x, labels)
    assert torch.equal(evaluated.weights, training[causal].weights)
    assert torch.equal(evaluated.expert_ids, training[causal].expert_ids)
    assert not any(name.startswith("cluster") for name in evaluated.stats)


def test_nothing_is_adaptive_before_two_steps() -> None:
    causal, plain = make(ACMOE), make(ACMOE, layer=0)
    x, labels = normal(40, 16), torch.arange(40) % 4
    for step in range(3):
        routing = route(causal, x, labels)
        same = torch.equal(routing.weights, route(plain, x, labels).weights)
        assert same == (step < 2)
        causal.after_step(routing.stats, 0.5)


@pytest.mark.parametrize("kind", ["mad", "variance"])
def test_statistics_are_sums_over_parts(kind: str) -> None:
    """Two halves of a batch, on two ranks or in two micro-batches, add up to the whole."""
    router = make({**ACMOE, "dispersion": kind})
    x, labels = normal(40, 16), torch.arange(40) % 4
    whole = route(router, x, labels).stats
    halves = [route(router, x[part], labels[part]).stats for part in (slice(0, 15), slice(15, 40))]
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value)


def test_pairs_of_one_cluster_each() -> None:
    x = torch.tensor([[1.0], [5.0], [2.0], [9.0]])
    sums = pair_differences(x, torch.tensor([1, 2, 1, 1]), 3)
    assert sums["cluster_counts"].tolist() == [3, 0, 0]
    assert sums["cluster_deviations"].tolist() == [[1 + 8 + 7], [0], [0]]


@pytest.mark.parametrize(
    "router", [ACMOE, PUBLISHED, {**PUBLISHED, "dispersion": "pairwise"}, {**ACMOE, "dispersion": "pairwise"}]
)
def test_ranks_that_share_rows_decide_alike(router: dict) -> None:
    part = make(router)
    if part.config.causal:
        part.means.copy_(normal(4, 16))
        part.dispersions.copy_(normal(4, 16, seed=1).exp())
        part.updates.fill_(2)
    info, x, state = batch(2, 12), normal(2, 12, 16), labelled(torch.arange(24) * 7 % 4).view(2, 12, 1)
    positions = torch.tensor([[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]])
    whole = part(x, state, info, None)
    found = on_ranks(positions, info, lambda b: part(b.here(x), b.here(state), b, None))
    for routing, places in zip(found, positions, strict=True):
        assert torch.equal(routing.state, whole.state[:, places])
        torch.testing.assert_close(routing.weights, whole.weights.view(2, 12, 2)[:, places].flatten(0, 1))
    stats = {name: found[0].stats[name] + found[1].stats[name] for name in whole.stats}
    if part.config.causal and part.config.dispersion == "pairwise":  # each rank counts all pairs
        for values in (stats, whole.stats):
            values["cluster_deviations"] = values["cluster_deviations"] / values.pop("cluster_counts")[:, None]
    torch.testing.assert_close(stats, dict(whole.stats))


def trained(router: dict, **model: object) -> nn.Module:
    """A decoder whose routers have seen three steps."""
    model = decoder_of(config_of(router, **model).model)
    for seed in range(3):
        info, targets = batch_of([[16], [16]], seed)
        with torch.no_grad():
            stats = model(info, targets).stats
        for name, values in stats.items():
            model.layers[name].mlp.router.after_step(values, 0.5)
    return model.eval()


@pytest.mark.parametrize("router", [ACMOE, {**ACMOE, "dispersion": "pairwise", "mix_weights": True}])
def test_later_tokens_and_other_rows_change_nothing(router: dict) -> None:
    model = trained(router)
    info, _ = batch_of([[7, 5], [12]])
    before = model(info).logits
    for row, t in ((0, 11), (0, 7), (0, 6), (1, 5)):
        tokens = info.tokens.clone()
        tokens[row, t] = (tokens[row, t] + 1) % 32
        after = model(info.__class__(**{**vars(info), "tokens": tokens})).logits
        assert torch.equal(before[1 - row], after[1 - row])
        assert torch.equal(before[row, :t], after[row, :t])
        assert not torch.equal(before[row, t], after[row, t])


def test_the_published_form_leaks() -> None:
    """What the setting says: an earlier token's output changes with a later token, and with another row."""
    model = trained({**PUBLISHED, "dispersion": "variance"})
    with torch.no_grad():
        for block in model.layers.values():
            block.mlp.experts.down.mul_(50)  # outputs that show who was chosen with which weight
    info, _ = batch_of([[12], [12]])
    before = model(info).logits
    tokens = info.tokens.clone()
    tokens[0, 11] = (tokens[0, 11] + 1) % 32
    after = model(info.__class__(**{**vars(info), "tokens": tokens})).logits
    assert not torch.equal(before[0, :11], after[0, :11])
    assert not torch.equal(before[1], after[1])
    assert config_of(ACMOE).model.leaks() == []
    (leak,) = config_of(PUBLISHED).model.leaks()
    assert "model.router.causal=false" in leak


# --- where it is applied ---------------------------------------------------------------------------------------------------------


def test_first_layers_are_plain_and_labels_pass_dense_layers() -> None:
    """GLaM's placement: every other block has experts."""
    model = trained({**ACMOE, "plain_layers": 2}, num_layers=7, moe_layer_freq=2)
    routers = {name: block.mlp.router for name, block in model.layers.items() if hasattr(block.mlp, "router")}
    assert {name: router.adaptive for name, router in routers.items()} == {"0": False, "2": False, "4": True, "6": True}
    assert not any("means" in name for name, _ in routers["2"].named_buffers())
    info, _ = batch_of([[12]])
    carry, chosen = model.start(info), []
    for name, block in model.layers.items():
        before = carry.state
        if name in routers:
            normed = block._attend(carry.hidden, info, _rotary(model, info))[1]
            chosen.append(routers[name](normed, carry.state, info, None).expert_ids[:, 0])
        carry, *_ = block(carry, info, _rotary(model, info), None)
        if name in routers:
            assert torch.equal(carry.state[0, :, 0], chosen[-1] + 1.0)
        else:
            assert carry.state is before


def _rotary(model: nn.Module, info: BatchInfo) -> tuple[Tensor, Tensor]:
    from moe_train.model.layers import rotary_tables

    return rotary_tables(info.positions, model.config.head_size, model.config.rope_theta)


def test_one_layer_at_least_is_adaptive() -> None:
    config = config_of(ACMOE).model
    bad = config.router.model_copy(update={"plain_layers": 3}).conflicts(config)
    assert [str(c) for c in bad] == [
        "model.router.plain_layers=3: must be below the number of MoE layers, so that one of them is adaptive; "
        "lower it or add layers"
    ]
