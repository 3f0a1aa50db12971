"""The routers that papers compare with: against loops and closed forms in fp64, and what their published codes get wrong."""

import dataclasses
import math

import pytest
import torch
from models import TINY, TOPK, batch_of, config_of, decoder_of
from routing import ask, layer_of, on_ranks, rows_of
from torch import Tensor
from torch.nn import functional as F

from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.flops import count_flops
from moe_train.model.decoder import Decoder
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.routing import Router, Routing
from moe_train.routers.expert_choice import BINS, LOWEST

PACKED = [[6, 4], [10]]


def conflict(router: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        parse({"model": {**TINY, "router": router}}, "test")


def decided(router: Router, seed: int = 0) -> tuple[Tensor, Routing]:
    """Hidden rows [T, D] and what the router makes of them."""
    batch, _ = batch_of(PACKED)
    x = rows_of(batch, seed=seed)
    return x.flatten(0, 1), ask(router, x, batch)


def best(scores: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    top = scores.topk(k)
    return top.indices, top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values


def check(routing: Routing, scores: Tensor, renormalize: bool = True) -> None:
    """Top 2 of the scores [T, E]."""
    ids, weights = best(scores, 2, renormalize)
    assert torch.equal(routing.expert_ids.long(), ids)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-10, atol=0)


# Gates that score in other ways


def test_mlp_by_hand() -> None:
    layer = layer_of({"name": "mlp", "router_size": 5}, spread=0.5)
    x, routing = decided(layer.router)
    r = layer.router
    check(routing, (F.gelu(x @ r.hidden.T + r.hidden_bias) @ r.scorer.T + r.scorer_bias).softmax(-1))


def test_mlp_has_the_papers_parameters() -> None:
    """SMoE-MLP of enwik8's medium size: 36,787,469 parameters where a linear gate with bias has 36,076,813."""
    config = config_of({"name": "mlp"}, hidden_size=352, num_layers=8, num_experts=16, num_heads=8)
    with torch.device("meta"):
        model = Decoder(config.model, None)
    found = sum(p.numel() for name, p in model.named_parameters() if "router" in name)
    assert found == 36_787_469 - 36_076_813 + 8 * (352 * 16 + 16)


def cosines(x: Tensor, experts: Tensor) -> Tensor:
    return torch.stack([F.cosine_similarity(x, e, dim=-1) for e in experts], -1)


def test_cosine_by_hand() -> None:
    """Neither the length of a row nor that of an embedding counts."""
    layer = layer_of({"name": "cosine", "temperature": 0.25})
    scorer = layer.router.scorer
    x, routing = decided(layer.router)
    assert float(scorer.log_scale.detach().exp()) == pytest.approx(1 / 0.25)
    check(routing, (cosines(x, scorer.embeddings) * scorer.log_scale.exp()).softmax(-1))
    batch, _ = batch_of(PACKED)
    with torch.no_grad():
        scorer.embeddings *= torch.tensor([[1.0], [5.0], [0.2], [9.0]])
    longer = ask(layer.router, 7 * rows_of(batch), batch)
    torch.testing.assert_close(longer.weights, routing.weights, rtol=1e-9, atol=0)


def test_a_temperature_stays_above_its_bound() -> None:
    layer = layer_of({"name": "cosine"})
    torch.nn.init.constant_(layer.router.scorer.log_scale, 50.0)
    x, routing = decided(layer.router)
    check(routing, (cosines(x, layer.router.scorer.embeddings) / 0.01).softmax(-1))


def test_xmoe_by_hand() -> None:
    layer = layer_of({"name": "xmoe", "router_size": 3, "temperature": 0.5})
    scorer = layer.router.scorer
    x, routing = decided(layer.router)
    check(routing, (cosines(x @ scorer.projector.T, scorer.embeddings) * scorer.log_scale.exp()).softmax(-1))
    assert float(scorer.log_scale.detach().exp()) == pytest.approx(1 / 0.5)
    assert sum(p.numel() for p in layer.router.parameters()) == 16 * 3 + 4 * 3 + 1


def test_hypermoe_by_hand() -> None:
    layer = layer_of({"name": "hypermoe", "hyper_size": 8, "embedding_size": 6})
    r = layer.router
    x, routing = decided(r)
    gate = (r.writer @ (r.reader @ r.embedding).relu()).view(4, 17)
    check(routing, (x @ gate[:, :16].T + gate[:, 16]).softmax(-1))
    (routing.weights * torch.arange(2.0)).sum().backward()
    assert [name for name, p in r.named_parameters() if p.requires_grad] == ["embedding"]
    assert float(r.embedding.grad.abs().max()) > 0
    assert r.active_params() == 4 * 17


def test_hypermoe_starts_like_a_linear_gate() -> None:
    layer = layer_of({"name": "hypermoe"}, hidden_size=256, num_experts=16)
    gate = layer.router.writer @ (layer.router.reader @ layer.router.embedding).relu()
    assert float(gate.detach().std()) == pytest.approx(0.02, rel=0.15)


# Frozen gates


@pytest.mark.parametrize("router", [{"name": "random"}, {"name": "topk", "frozen": True}])
def test_a_frozen_gate_routes_as_a_linear_one_and_is_not_trained(router: dict) -> None:
    plain, frozen = layer_of(TOPK), layer_of(router)
    assert decided(plain.router)[1].weights.equal(decided(frozen.router)[1].weights)
    assert not any(p.requires_grad for p in frozen.router.parameters())
    assert all(p.requires_grad for p in frozen.experts.parameters())


def test_random_cannot_be_trained() -> None:
    conflict({"name": "random", "frozen": False}, r"model\.router\.frozen")


# Group-limited routing


def test_groups_by_loops() -> None:
    """Four groups of three; a token's four experts come from two of them, those with the largest sums of their two best scores."""
    layer = layer_of({**TOPK, "top_k": 4, "num_groups": 4, "top_groups": 2}, spread=1.0, num_experts=12)
    x, routing = decided(layer.router)
    scores = (x @ layer.router.weight.T).softmax(-1)
    free = scores.topk(4).indices
    for t, row in enumerate(scores.tolist()):
        groups = [row[g : g + 3] for g in range(0, 12, 3)]
        chosen = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        allowed = [e for e in range(12) if e // 3 in chosen]
        expected = sorted(allowed, key=lambda e: -row[e])[:4]
        assert routing.expert_ids[t].tolist() == expected
        total = sum(row[e] for e in expected)
        assert routing.weights[t].tolist() == pytest.approx([row[e] / total for e in expected])
    assert not torch.equal(free, routing.expert_ids.long())  # the limit counted
    assert routing.stats["tokens_per_expert"].tolist() == torch.bincount(routing.expert_ids.flatten(), minlength=12).tolist()


def test_all_groups_are_no_limit() -> None:
    free = decided(layer_of(TOPK, spread=1.0).router)[1]
    grouped = decided(layer_of({**TOPK, "num_groups": 2, "top_groups": 2}, spread=1.0).router)[1]
    assert free.expert_ids.equal(grouped.expert_ids)
    torch.testing.assert_close(free.weights, grouped.weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"num_groups": 3}, r"num_groups=3: must divide model\.num_experts=4"),
        ({"num_groups": 2, "top_groups": 3}, r"top_groups=3: must be at most model\.router\.num_groups=2"),
        ({"num_groups": 2, "top_k": 3}, r"top_k=3: .*at most 2 times"),
        ({"num_groups": 4, "top_groups": 2, "top_k": 3}, r"top_k=3: must be a multiple of top_groups=2"),
    ],
)
def test_groups_that_cannot_be(keys: dict, part: str) -> None:
    conflict({**TOPK, **keys}, part)


# StableMoE


def stable(**keys: object) -> MoE:
    return layer_of({"name": "stablemoe", "word_size": 5, **keys}, spread=1.0)


def test_stablemoe_learns_in_stage_1() -> None:
    layer = stable()
    x, routing = decided(layer.router)
    scores = (x @ layer.router.weight.T).sigmoid()
    check(routing, scores, renormalize=False)
    tokens = batch_of(PACKED)[0].tokens.flatten()
    words = layer.router.words[tokens] @ layer.router.word_scorer.T
    expected = sum(F.cross_entropy(words, routing.expert_ids[:, k].long(), reduction="sum") for k in (0, 1)) / 2
    torch.testing.assert_close(routing.losses["distil"], expected, rtol=1e-10, atol=0)
    routing.losses["distil"].backward()
    assert layer.router.weight.grad is None  # the light router learns from the other, not the other way round
    assert float(layer.router.words.grad.abs().max()) > 0
    assert layer.router.frozen() == []


def test_stablemoe_is_fixed_in_stage_2() -> None:
    layer = stable(stage1_share=0.3)
    router = layer.router
    before = decided(router)[1]
    for progress, stage in ((0.29, 0), (0.3, 1), (1.0, 1), (0.1, 1)):  # the last: a run that goes on with ten times the steps
        router.after_step(before.stats, progress)
        assert int(router.stage2) == stage
        assert len(router.frozen()) == 2 * stage
    x, routing = decided(router)
    tokens = batch_of(PACKED)[0].tokens.flatten()
    ids = (router.words[tokens] @ router.word_scorer.T).topk(2).indices
    assert torch.equal(routing.expert_ids.long(), ids)
    torch.testing.assert_close(routing.weights, (x @ router.weight.T).sigmoid().gather(1, ids), rtol=1e-10, atol=0)
    assert {name: float(value.detach()) for name, value in routing.losses.items()} == {"balance": 0.0, "distil": 0.0}
    _, other = decided(router, seed=1)
    assert other.expert_ids.equal(routing.expert_ids)  # other hidden rows, same words
    routing.weights.sum().backward()
    assert float(router.weight.grad.abs().max()) > 0  # how much an expert counts goes on being learned


# SMoE-Dropout


def test_smoe_dropout_takes_more_and_more_experts() -> None:
    layer = layer_of({"name": "smoe_dropout", "top_k": 1}, spread=1.0)
    router = layer.router
    _, routing = decided(router)
    for progress, k in ((0.0, 1), (0.3, 2), (0.5, 2), (0.7, 3), (1.0, 4)):
        router.after_step(routing.stats, progress)
        x, routing = decided(router)
        scores = (x @ router.weight.T).softmax(-1)
        ids, weights = best(scores, k)
        assert torch.equal(routing.expert_ids[:, :k].long(), ids)
        assert (routing.expert_ids[:, k:] == -1).all()
        torch.testing.assert_close(routing.weights[:, :k], weights, rtol=1e-10, atol=0)
        assert (routing.weights[:, k:] == 0).all()
        assert int(routing.stats["tokens_per_expert"].sum()) == 20 * k
    assert not any(p.requires_grad for p in router.parameters())


@pytest.mark.parametrize("final", [1, 5])
def test_smoe_dropout_ends_between_its_start_and_all(final: int) -> None:
    conflict({"name": "smoe_dropout", "final_top_k": final}, rf"final_top_k={final}: must be from model\.router\.top_k=2")
    conflict({"name": "smoe_dropout", "num_groups": 2}, r"num_groups=2: a number of experts that grows")


# Hash layers


def hashed(layer: int = 0, vocab: int = 4096, experts: int = 8, **keys: int) -> Tensor:
    """The experts of each token id: [V, 2]."""
    config = config_of({"name": "hash", **keys}, num_experts=experts, num_layers=3, vocab_size=vocab).model
    router = MoE(config, layer, None).router
    batch, _ = batch_of([[vocab]])
    batch = dataclasses.replace(batch, tokens=torch.arange(vocab)[None])
    return ask(router, torch.zeros(1, vocab, 16), batch).expert_ids


def test_hash_goes_by_the_token_alone() -> None:
    table = hashed(vocab=32, experts=4)
    router = layer_of({"name": "hash"}).router
    batch, _ = batch_of(PACKED, seed=3)
    for step, seed in ((0, 0), (7, 1)):
        batch = dataclasses.replace(batch, step=step, seed=seed, rows=batch.rows + step)
        routing = ask(router, rows_of(batch, seed=seed), batch)
        assert routing.expert_ids.equal(table[batch.tokens.flatten()])
        assert (routing.weights == 0.5).all()


def test_hash_deals_the_vocabulary_evenly_and_in_other_ways() -> None:
    first, second, other = hashed(), hashed(layer=1), hashed(hash_seed=1)
    for table in (first, second, other):
        assert (table[:, 0] != table[:, 1]).all()
        shares = torch.bincount(table.flatten(), minlength=8) / table.numel()
        assert float(shares.max()) < 0.125 * 1.12
        assert float(shares.min()) > 0.125 * 0.88
    for table in (second, other):  # as often the same as chance has it
        assert float((table[:, 0] == first[:, 0]).double().mean()) == pytest.approx(0.125, abs=0.03)


# Expert choice


def affinities(values: list[float]) -> Tensor:
    """Hidden rows [1, T, 16] to which a router with weights (e_0, 0, 0, 0) gives these scores of expert 0, of two."""
    x = torch.zeros(1, len(values), 16, dtype=torch.float64)
    x[0, :, 0] = torch.tensor(values, dtype=torch.float64).logit()
    return x


def first_experts_tokens(values: list[float]) -> list[int]:
    layer = layer_of({"name": "expert_choice", "top_k": 1, "causal": False}, num_experts=2)
    with torch.no_grad():
        layer.router.weight.zero_()[0, 0] = 1.0
    routing = ask(layer.router, affinities(values), batch_of([[len(values)]])[0])
    assert int(routing.stats["tokens_per_expert"][1]) == 4
    return [t + 1 for t in range(len(values)) if 0 in routing.expert_ids[t].tolist()]


def test_published_expert_choice_looks_ahead() -> None:
    values = [0.81, 0.22, 0.55, 0.19, 0.60, 0.91, 0.14, 0.58]
    assert first_experts_tokens(values) == [1, 5, 6, 8]
    assert first_experts_tokens([*values[:7], 0.10]) == [1, 3, 5, 6]  # token 3's expert because of token 8


def test_published_expert_choice_over_rows() -> None:
    """Each expert takes exactly its share of the whole micro-batch, however the rows lie on ranks; equal tokens go to the first."""
    router = layer_of({"name": "expert_choice", "causal": False}, spread=1.0).router
    batch, _ = batch_of([[8], [8]])
    x = rows_of(batch)
    x[1, :4] = x[0, :4]
    whole = ask(router, x, batch)
    assert whole.stats["tokens_per_expert"].tolist() == [8, 8, 8, 8]
    scores = (x.flatten(0, 1) @ router.weight.T).softmax(-1)
    for e in range(4):
        order = sorted(range(16), key=lambda t: (-float(scores[t, e].detach()), t))
        assert [t for t in range(16) if int(whole.expert_ids[t, e]) == e] == sorted(order[:8])
    positions = torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]])
    for part, places in zip(on_ranks(positions, batch, lambda b: ask(router, b.here(x), b)), positions, strict=True):
        assert part.expert_ids.view(2, 4, 4).equal(whole.expert_ids.view(2, 8, 4)[:, places])


def test_published_expert_choice_takes_its_whole_share() -> None:
    """29 of 50 tokens; 29 / 50 * 50 is less than 29 in floating point."""
    router = layer_of({"name": "expert_choice", "causal": False, "top_k": 29}, spread=1.0, num_experts=50).router
    batch, _ = batch_of([[50]])
    assert ask(router, rows_of(batch), batch).stats["tokens_per_expert"].tolist() == [29] * 50


def test_expert_choice_by_threshold() -> None:
    router = layer_of({"name": "expert_choice"}, spread=1.0).router
    router.log_threshold.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    x, routing = decided(router)
    scores = (x @ router.weight.T).softmax(-1)
    for t in range(20):
        for e, bound in enumerate((0.1, 0.2, 0.3, 0.4)):
            assert int(routing.expert_ids[t, e]) == (e if float(scores[t, e].detach()) >= bound else -1)
    torch.testing.assert_close(routing.weights, scores, rtol=1e-10, atol=0)


def wide(**keys: object) -> tuple[Router, Tensor]:
    """A router for which chance evens out, and 2048 rows with a mean square of 1."""
    router = layer_of({"name": "expert_choice", **keys}, hidden_size=256, num_experts=8).router
    return router, torch.randn(1, 2048, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_expert_choice_starts_with_top_k_experts_in_the_mean() -> None:
    for k in (1, 2, 4, 8):
        router, x = wide(top_k=k)
        taken = int((ask(router, x, batch_of([[2048]])[0]).expert_ids >= 0).sum()) / 2048
        assert taken == pytest.approx(k, rel=0.15)


def test_expert_choice_follows_the_scores() -> None:
    """The thresholds come to where each expert has its share, though the scores were skewed and lie on ranks."""
    router, x = wide(threshold_momentum=0.5)
    with torch.no_grad():
        router.weight *= 3
        router.weight[:, 0] += torch.linspace(-2, 2, 8)
        x[..., 0] = 1.0  # an offset of the logits
    batch, _ = batch_of([[2048]])
    first = ask(router, x, batch).stats["tokens_per_expert"]
    assert float(first.max() / first.double().mean()) > 2
    for _ in range(12):
        halves = [ask(router, part.contiguous(), batch_of([[1024]])[0]).stats for part in x.split(1024, 1)]
        router.after_step({name: (halves[0][name] + halves[1][name]).double() for name in halves[0]}, 0.5)
    scores = ask(router, x, batch).weights
    exact = scores.quantile(0.75, dim=0)
    torch.testing.assert_close(router.log_threshold.exp(), exact.detach(), rtol=-LOWEST / BINS / 4, atol=0)
    loads = ask(router, x, batch).stats["tokens_per_expert"]
    assert loads.tolist() == pytest.approx([512] * 8, rel=0.05)


# Balancing without a loss


def free_of_loss(**keys: object) -> Router:
    return layer_of({"name": "aux_free", **keys}, spread=1.0).router


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = free_of_loss()
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    x, routing = decided(router)
    scores = (x @ router.weight.T).sigmoid()
    ids = (scores + router.expert_bias).topk(2).indices
    assert (ids[:, 0] == 3).all()
    assert torch.equal(routing.expert_ids.long(), ids)
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True), rtol=1e-10, atol=0)
    assert routing.losses == {}


def test_the_bias_moves_against_the_load() -> None:
    router = free_of_loss(bias_rate=0.25)
    router.after_step({"tokens_per_expert": torch.tensor([6, 2, 0, 0])}, 0.5)
    assert router.expert_bias.tolist() == [-0.25, 0.0, 0.25, 0.25]


def test_the_bias_evens_out_the_load() -> None:
    router = free_of_loss(bias_rate=0.02, top_k=1, renormalize=False)
    with torch.no_grad():
        router.weight.mul_(0.3)[:, 0] = torch.tensor([1.0, 0.5, 0.0, -0.5])
    batch, _ = batch_of([[500]])
    x = rows_of(batch)
    x[..., 0] = 1.0
    loads = []
    for _ in range(100):
        stats = ask(router, x, batch).stats
        loads.append(float(stats["tokens_per_expert"].max()) / 125)
        router.after_step(stats, 0.5)
    assert loads[0] > 1.8
    assert loads[-1] < 1.15


def test_no_cast_touches_the_bias() -> None:
    router = free_of_loss()
    value = torch.tensor([0.1234567, -1.0009765, 3e-8, 0.0])
    router.expert_bias.copy_(value)
    for cast in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        router.to(cast)
        assert router.weight.dtype == cast
        assert router.expert_bias.dtype == torch.float32
        assert router.expert_bias.equal(value)
    moved = router.to("meta")
    assert (moved.expert_bias.device.type, moved.expert_bias.dtype) == ("meta", torch.float32)
    router.to_empty(device="cpu")
    initialise(router, 0)
    assert router.expert_bias.tolist() == [0.0] * 4
    assert "expert_bias" in router.state_dict()


# Shared experts and what a token costs


@pytest.mark.parametrize(
    ("router", "per_layer"),
    [
        ({"name": "mlp", "router_size": 8}, 16 * 8 + 8 * 4),
        ({"name": "hypermoe"}, 4 * 17),
        ({"name": "stablemoe", "word_size": 5}, 16 * 4 + 5 * 4),
        ({"name": "hash"}, 0),
    ],
)
def test_what_a_tokens_routing_costs(router: dict, per_layer: int) -> None:
    """Rows that are looked up and matrices that are written once are no multiplications of a token."""
    assert count_flops(config_of(router).model, 32).router == 3 * per_layer


def test_experts_that_a_token_costs() -> None:
    expert = 3 * 16 * 8
    dropout = count_flops(config_of({"name": "smoe_dropout", "top_k": 1, "final_top_k": 3}).model, 32)
    assert dropout.experts == 3 * 2 * expert  # 1 at the start, 3 at the end
    assert count_flops(config_of({"name": "expert_choice", "top_k": 3}).model, 32).experts == 3 * 3 * expert


def test_a_shared_expert_stands_beside_any_router() -> None:
    config = config_of({"name": "expert_choice"}, shared_expert_size=8).model
    model = decoder_of(config)
    batch, targets = batch_of(PACKED)
    model.layers["0"].mlp.router.log_threshold.fill_(math.inf)  # nobody takes anything
    model(batch, targets).loss.backward()
    moe = model.layers["0"].mlp
    assert float(moe.shared_expert.down.weight.grad.abs().max()) > 0
    assert float(moe.experts.down.grad.abs().max()) == 0
