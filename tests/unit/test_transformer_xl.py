"""The block of the papers' small models: each formula against loops over it, memory, dropout, and the papers' parameter totals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_corpus
from layouts import BASE, FP64, Bench, Case
from models import RECURRENT, TOPK, batch_of, config_of, decoder_of, make_batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import get_backend
from moe_train import routers
from moe_train.cli import load_run, merge, parse
from moe_train.config import ModelConfig
from moe_train.errors import UserError
from moe_train.evaluate import check_memory
from moe_train.flops import count_flops
from moe_train.generate import cache_conflicts
from moe_train.model.cache import Cache
from moe_train.model.decoder import Decoder
from moe_train.model.experts import Merge, ReluExperts
from moe_train.model.init import initialise
from moe_train.model.moe import MoE
from moe_train.model.relative_attention import Positions, RelativeAttention, shift, sinusoids
from moe_train.model.routing import BatchInfo
from moe_train.model.transformer_xl import Memory, TransformerXLBlock
from moe_train.parallel.recompute import apply_recompute

PAPERS = Path(__file__).parents[2] / "configs" / "papers"
KINDS = ("table", "relative", "absolute")
SIZES = {
    "recurrent": {"router_size": 8},
    "mlp": {"router_size": 8},
    "hypermoe": {"hyper_size": 8},
    "smear": {"segment_size": 3},
}


def keys_of(kind: str = "table", span: int = 5, **others: Any) -> dict[str, Any]:
    return {"attn_type": kind, **({"attn_span": span} if kind == "table" else {}), **others}


def config_for(
    kind: str = "table", span: int = 5, router: dict | None = None, sizes: dict | None = None, **keys: Any
) -> ModelConfig:
    """A tiny model of the block; its weights are wide, so that it is far from linear."""
    return config_of(
        router or RECURRENT,
        **{"block": "transformer_xl", "init_std": 0.3, "transformer_xl": keys_of(kind, span, **keys), **(sizes or {})},
    ).model


def grown(model: nn.Module) -> nn.Module:
    """With biases and norms that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def model_for(*args: Any, **keys: Any) -> Decoder:
    return grown(decoder_of(config_for(*args, **keys)))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Attention


def test_shift_is_a_gather_of_distances() -> None:
    for queries, keys in ((4, 4), (3, 7), (1, 5)):
        scores = torch.randn(2, queries, keys, dtype=torch.float64)  # column c: distance keys - 1 - c
        shifted = shift(scores)
        for i in range(queries):
            for j in range(keys - queries + i + 1):
                distance = keys - queries + i - j
                assert torch.equal(shifted[:, i, j], scores[:, i, keys - 1 - distance])


def attention_by_hand(attention: RelativeAttention, positions: Positions, x: Tensor, doc_ids: Tensor) -> Tensor:
    """Loops over rows, heads, queries and keys, from the equations of relative_attention.py."""
    rows, length, size = x.shape
    d, kind = attention.head_dim, positions.kind
    out = torch.zeros(rows, length, attention.out.weight.shape[1], dtype=x.dtype)
    q, k, v = (x @ m.weight.T for m in (attention.q, attention.k, attention.v))
    for b in range(rows):
        for h in range(q.shape[-1] // d):
            cut = slice(h * d, (h + 1) * d)
            for t in range(length):
                scores, values = [], []
                for s in range(t - positions.config.transformer_xl.attn_span, t) if kind == "table" else range(t + 1):
                    there = s >= 0 and bool(doc_ids[b, s] == doc_ids[b, t])
                    key, value = (k[b, s, cut], v[b, s, cut]) if there else (torch.zeros(d).double(), torch.zeros(d).double())
                    query = q[b, t, cut]
                    if kind == "table":
                        scores.append(query @ (key + positions.table.weight[t - s - 1]))
                    elif not there:
                        continue
                    elif kind == "relative":
                        r = attention.position.weight[cut] @ wave(t - s, size)
                        scores.append((query + positions.content_bias[cut]) @ key + (query + positions.position_bias[cut]) @ r)
                    else:
                        scores.append(query @ key)
                    values.append(value)
                weights = (torch.stack(scores) / d**0.5).softmax(0)
                out[b, t, cut] = weights @ torch.stack(values)
    return out @ attention.out.weight.T


def wave(place: int, size: int) -> Tensor:
    angles = [place / 10000 ** (2 * i / size) for i in range(size // 2)]
    return torch.cat([torch.tensor(angles, dtype=torch.float64).sin(), torch.tensor(angles, dtype=torch.float64).cos()])


@pytest.mark.parametrize(("kind", "span"), [("table", 3), ("table", 30), ("relative", 0), ("absolute", 0)])
@pytest.mark.parametrize("documents", [[[7, 1, 4], [12]], [[12], [12]]])
def test_attention_by_hand(kind: str, span: int, documents: list[list[int]]) -> None:
    model = model_for(kind, span)
    attention, positions = model.layers["1"].attention, model.positions
    batch, _ = batch_of(documents)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    found = attention(x, x, batch, positions(batch, 0))
    torch.testing.assert_close(found, attention_by_hand(attention, positions, x, batch.doc_ids), rtol=1e-9, atol=1e-12)


def test_absolute_positions_are_added_to_scaled_embeddings() -> None:
    batch, _ = batch_of([[7, 5]])
    for kind in KINDS:
        model = model_for(kind)
        words = model.embedding.weight[batch.tokens]
        wanted = words if kind == "table" else 4.0 * words
        if kind == "absolute":
            wanted = wanted + torch.stack([wave(int(p), 16) for p in batch.positions[0]])
        torch.testing.assert_close(model.start(batch).hidden, wanted, rtol=1e-9, atol=1e-9)
    assert sinusoids(torch.tensor([3]), 6).shape == (1, 6)


# Experts


def experts_by_hand(experts: ReluExperts, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor | None = None) -> Tensor:
    """kept [T, K, F]: what is not dropped, at its scale."""
    up_bias, down_bias = experts.up_bias.view(experts.count, -1), experts.down_bias.view(experts.count, -1)
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e >= 0:
                hidden = (experts.up[e] @ x[t] + up_bias[e]).clamp_min(0)
                hidden = hidden if kept is None else hidden * kept[t, k]
                total = total + weights[t, k] * (experts.down[e] @ hidden + down_bias[e])
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_experts_by_hand(backend: str) -> None:
    experts = ReluExperts(config_for(), get_backend(backend)).double()
    initialise(experts, 0)
    grown(experts)
    x, weights = torch.randn(9, 16, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    ids = torch.tensor(
        [[0, 1], [3, -1], [-1, -1], [1, 0], [0, 3], [3, 1], [1, 1], [0, -1], [3, 0]], dtype=torch.int32
    )  # none to 2
    found = []
    for call in (experts, lambda *args: experts_by_hand(experts, *args)):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        experts.zero_grad()
        out = call(leaves[0], ids, leaves[1])
        (out * torch.arange(16)).sum().backward()
        found.append((out.detach(), [leaf.grad for leaf in leaves], gradients(experts)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert float(found[0][2]["up_bias"].view(4, -1)[2].abs().max()) == 0


def test_merged_experts_are_the_expert_of_mixed_parameters() -> None:
    experts = ReluExperts(config_for(), get_backend("torch")).double()
    initialise(experts, 0)
    grown(experts)
    x, up, down = torch.randn(3, 16, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64), torch.rand(2, 4).double()
    ids = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    found = experts(x, ids, torch.ones(3, 1, dtype=torch.float64), Merge(up, down))
    for t, n in enumerate([1, 0, 1]):
        hidden = ((up[n] @ experts.up.flatten(1)).view(8, 16) @ x[t] + up[n] @ experts.up_bias.view(4, -1)).clamp_min(0)
        wanted = (down[n] @ experts.down.flatten(1)).view(16, 8) @ hidden + down[n] @ experts.down_bias.view(4, -1)
        torch.testing.assert_close(found[t], wanted, rtol=1e-10, atol=1e-12)


# Layers


def norm_of(norm: Any, x: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("residual", ["double", "single"])
@pytest.mark.parametrize("kind", ["table", "relative"])
def test_layers_are_wired_as_published(residual: str, kind: str) -> None:
    """Every kind of layer, transcribed: u = LN(x + Attn(x)); y = LN(u + LN(u + MoE(u))), LN(u + MoE(u)) or LN(u + MLP(u))."""
    model = model_for(kind, layers="sgsfs..g.f", residual=residual, router=TOPK, sizes={"num_layers": 5}).eval()
    batch, targets = batch_of([[7, 5], [12]])
    carry, places = model.start(batch), model.positions(batch, 0)
    x = carry.hidden
    for i, pair in enumerate(("sg", "sf", "s.", ".g", ".f")):
        layer = model.layers[str(i)]
        assert isinstance(layer, TransformerXLBlock)
        u = norm_of(layer.attention_norm, x + layer.attention(x, x, batch, places)) if pair[0] == "s" else x
        if pair[1] == "g":
            scores = (u.flatten(0, 1) @ layer.mlp.router.weight.T).softmax(-1)
            weights, ids = scores.topk(2)
            routed = experts_by_hand(layer.mlp.experts, u.flatten(0, 1), ids, weights / weights.sum(-1, keepdim=True))
            m = u + routed.view_as(u)
            x = norm_of(layer.moe_norm, u + norm_of(layer.inner_norm, m) if residual == "double" else m)
        elif pair[1] == "f":
            mlp = layer.mlp
            hidden = (u @ mlp.up.T + mlp.up_bias).clamp_min(0)
            x = norm_of(layer.dense_norm, u + hidden @ mlp.down.T + mlp.down_bias)
        else:
            x = u
    wanted = x @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(batch).logits, wanted, rtol=1e-9, atol=1e-10)
    loss = F.cross_entropy(wanted.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(model(batch, targets).token_loss.flatten().double(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_every_trained_parameter(kind: str) -> None:
    model = decoder_of(config_for(kind, layers="sgsfsg", dropout=0.1))
    batch, targets = batch_of([[7, 5], [12]])
    model(batch, targets).loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().max())}
    spare = {f"layers.{i}.{norm}.{part}" for i, norm in ((0, "dense"), (1, "moe"), (2, "dense")) for part in ("weight", "bias")}
    assert still == {name.replace(".dense.", ".dense_norm.").replace(".moe.", ".moe_norm.") for name in spare}
    assert still == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_no_earlier_token_and_no_other_document(kind: str) -> None:
    model = model_for(kind).eval()
    batch, _ = batch_of([[6, 6]])
    before = model(batch).logits
    for position in range(12):
        tokens = batch.tokens.clone()
        tokens[0, position] = (tokens[0, position] + 1) % 32
        changed = (model(make_batch(tokens, batch.positions, batch.doc_ids)).logits - before).abs().amax(-1)[0] > 1e-12
        end = 6 if position < 6 else 12
        assert not changed[:position].any()
        assert not changed[end:].any()
        assert changed[position:end].all()


@pytest.mark.parametrize("name", sorted(routers.registry()))
def test_every_router_works_in_the_block(name: str) -> None:
    model = decoder_of(config_for(router={"name": name, **SIZES.get(name, {})}, dropout=0.2))
    batch, targets = batch_of([[7, 5], [12]])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(batch, targets)
    output.loss.backward()
    assert set(output.stats) == {"0", "1", "2"}
    found = gradients(model)
    for key in (
        "layers.0.mlp.experts.up",
        "layers.0.mlp.experts.up_bias",
        "layers.2.mlp.experts.down_bias",
        "positions.table.weight",
    ):
        assert float(found[key].abs().max()) > 0
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(mode: str) -> None:
    batch, targets = batch_of([[7, 5], [12]])
    found = []
    for again in (False, True):
        model = model_for(layers="sgsfsg", dropout=0.2)
        if again:
            apply_recompute(model, mode)
        output = model(batch, targets)
        output.loss.backward()
        found.append((output.loss.detach(), output.stats, gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# Dropout


def test_dropout_is_the_same_for_a_step_and_a_row_wherever_the_row_is() -> None:
    """With VQMoE each token sends two rows to the experts."""
    batch, _ = batch_of([[7, 5], [12], [12]])
    for router in (TOPK, {"name": "vqmoe"}):
        model = model_for("relative", dropout=0.3, layers="sgsfsg", router=router)
        hidden = model.run_layers(model.start(batch), batch)[0].hidden
        assert torch.equal(model.run_layers(model.start(batch), batch)[0].hidden, hidden)
        part = replace(
            batch,
            **{k: getattr(batch, k)[1:] for k in ("tokens", "positions", "doc_ids", "labels", "rows")},
            segments=None,
        )
        torch.testing.assert_close(model.run_layers(model.start(part), part)[0].hidden, hidden[1:], rtol=0, atol=1e-12)
        for change in ({"step": 1}, {"seed": 1}):
            other = replace(batch, **change)
            assert not torch.allclose(model.run_layers(model.start(other), other)[0].hidden, hidden, atol=1e-3)
        model.eval()
        quiet = model_for("relative", layers="sgsfsg", router=router)
        torch.testing.assert_close(model(batch).logits, quiet.eval()(batch).logits, rtol=0, atol=0)


def test_dropout_of_the_experts_hidden_units_by_hand() -> None:
    layer = model_for(router=TOPK, dropout=0.25).layers["1"]
    batch, _ = batch_of([[7, 5], [12]])
    from moe_train.model.dropout import ExpertDropout, drop

    x = torch.randn(24, 16, dtype=torch.float64)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(24)]).int()
    weights = torch.rand(24, 2, dtype=torch.float64)
    kept = (batch.random("expert_dropout", 1, 2 * 8) >= 0.25).view(24, 2, 8).double() / 0.75
    found = layer.mlp.experts(x, ids, weights, drop=ExpertDropout(batch, 0.25, 1))
    torch.testing.assert_close(found, experts_by_hand(layer.mlp.experts, x, ids, weights, kept), rtol=1e-10, atol=1e-12)
    ones = drop(torch.ones(2, 12, 400), batch, 0.25, 0, "name")
    assert ones.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((ones == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_where_it_is_said_to_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    drawn = BatchInfo.random
    monkeypatch.setattr(
        BatchInfo, "random", lambda self, name, layer, n: names.append((name, layer)) or drawn(self, name, layer, n)
    )
    model = model_for(kind, layers="sgsfsg", router={**TOPK, "balance_scope": "global_batch"}, dropout=0.3)
    batch, _ = batch_of([[12]])
    model(batch)
    experts = [(name, layer) for layer in (0, 2) for name in ("expert_dropout", "moe_dropout")] + [("mlp_dropout", 1)]
    attention = "attention_dropout" if kind == "table" else "attention_output_dropout"
    wanted = experts + [(attention, layer) for layer in range(3)]
    if kind != "table":
        wanted += [("embedding_dropout", 0), ("mlp_output_dropout", 1), ("last_dropout", 2)]
    assert sorted(names) == sorted(wanted)


# Memory and decoding


def part_of(batch: BatchInfo, start: int, end: int) -> BatchInfo:
    """Columns of whole rows as a loader cuts them: positions and documents are counted from the cut."""
    doc_ids = batch.doc_ids[:, start:end] - batch.doc_ids[:, start : start + 1]
    positions = torch.where(doc_ids == 0, torch.arange(end - start), batch.positions[:, start:end])
    return replace(make_batch(batch.tokens[:, start:end], positions, doc_ids), labels=batch.labels[:, start:end])


def go_on(batch: BatchInfo, before: Tensor) -> BatchInfo:
    """The batch whose rows go on with documents of which `before` [B] tokens came earlier."""
    return replace(batch, positions=batch.positions + (batch.doc_ids == batch.doc_ids[:, :1]) * before[:, None])


def in_segments(model: Decoder, batch: BatchInfo, targets: Tensor, cuts: list[int], most: int) -> Tensor:
    """Losses of rows that come in segments, with a memory of `most` rows."""
    memory, losses = Memory.start(len(targets), most), []
    for start, end in zip([0, *cuts], [*cuts, targets.shape[1]], strict=True):
        part = part_of(batch, start, end)
        before = torch.where(part.positions[:, 0] == batch.positions[:, start], 0, batch.positions[:, start])
        output = model(go_on(part, before), targets[:, start:end], cache=memory)
        memory = output.cache
        losses.append(output.token_loss)
        assert not any(rows.requires_grad for past in memory.layers.values() for rows in past.seen or ())
    return torch.cat(losses, 1)


@pytest.mark.parametrize("router", [RECURRENT, {"name": "smear", "segment_size": 3}])
@pytest.mark.parametrize(("kind", "span", "most"), [("table", 3, 3), ("table", 30, 12), ("relative", 0, 12)])
def test_segments_with_memory_are_one_long_row(kind: str, span: int, most: int, router: dict) -> None:
    """Memory of as many rows as attention sees; documents end inside, at and after the cuts."""
    batch, targets = batch_of([[7, 5], [12], [4, 1, 7], [9, 3]])
    model = model_for(kind, span, router=router).eval()
    whole = model(batch, targets).token_loss
    torch.testing.assert_close(in_segments(model, batch, targets, [4, 6], most), whole, rtol=1e-5, atol=1e-6)
    short = in_segments(model, batch, targets, [4, 6], 1)
    assert not torch.allclose(short, whole, atol=1e-3)


def test_a_forward_does_not_change_the_memory_that_it_gets() -> None:
    batch, targets = batch_of([[12], [12]])
    model = model_for("relative").eval()
    first = model(batch, targets, cache=Memory.start(2, 8)).cache
    kept = {name: past.seen[0].clone() for name, past in first.layers.items()}
    second = model(go_on(batch, torch.tensor([12, 12])), targets, cache=first).cache
    assert first.length == second.length == 8
    for name, rows in kept.items():
        assert torch.equal(first.layers[name].seen[0], rows)
        assert rows.shape == (2, 8, 16)
        assert torch.equal(second.layers[name].seen[0], rows) == (name == "0")  # the first layer got the same words


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_one_token_at_a_time_gives_the_logits_of_whole_rows(kind: str) -> None:
    """Rows of different lengths end in the same column."""
    model = model_for(kind, 4).eval()
    tokens, padding = torch.randint(1, 32, (2, 9)), torch.tensor([0, 3])
    cache = Cache(padding)
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, 9))]:
        output = model(cache.batch(tokens[:, start:end], torch.float64), cache=cache)
        cache = output.cache
        for row, skip in enumerate(padding.tolist()):
            alone = tokens[row : row + 1, skip:end]
            whole = model(make_batch(alone, torch.arange(end - skip)[None], torch.zeros_like(alone))).logits
            torch.testing.assert_close(output.logits[row, 0], whole[0, -1], rtol=1e-9, atol=1e-9)
    assert not cache_conflicts(parse({"model": {"block": "transformer_xl"}}, "test"))


@pytest.mark.parametrize(
    ("content", "ranks", "message"),
    [
        ({"model": {"block": "llama"}}, 1, "model.block=llama: only blocks of transformer_xl"),
        ({"model": {"transformer_xl": {"attn_type": "absolute"}}}, 1, "model.transformer_xl.attn_type=absolute: positions"),
        ({"data": {"mask_documents": False}}, 1, "data.mask_documents=False: with memory"),
        ({}, 2, "world size=2: with memory rows are evaluated one after the other"),
    ],
)
def test_what_cannot_be_evaluated_with_memory_is_refused(content: dict, ranks: int, message: str) -> None:
    config = parse(merge({"model": {"block": "transformer_xl"}}, content), "test")
    with pytest.raises(UserError) as error:
        check_memory(config, ranks)
    assert message in str(error.value)


# Sizes, keys and costs


def total(path: str, *words: str) -> int:
    config = load_run(PAPERS / path, ["model.vocab_size=205", *words])
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config.model, get_backend("torch")).parameters())


SMOE = ("model.router.name=topk", "model.router.bias=true")


@pytest.mark.parametrize(
    ("path", "words", "expected"),
    [
        ("rmoe_medium.yaml", SMOE, 36_076_813),
        ("rmoe_medium.yaml", ("model.router.name=mlp",), 36_787_469),
        ("rmoe_medium.yaml", (), 36_508_685),
        ("rmoe_medium.yaml", ("model.router.cell=rnn",), 36_442_637),
        ("rmoe_medium.yaml", ("model.router.cell=lstm",), 36_541_709),
        ("rmoe_medium.yaml", ("model.router.projector=shared",), 36_233_229),
        ("rmoe_small.yaml", SMOE, 15_319_165),
        ("rmoe_small.yaml", (), 15_608_701),
        ("rmoe_small.yaml", ("model.router.name=mlp",), 15_725_437),
    ],
)
def test_totals_of_the_rmoe_paper(path: str, words: tuple[str, ...], expected: int) -> None:
    assert total(path, *words) == expected


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_of_the_papers_can_be_built_and_counted(path: Path) -> None:
    config = load_run(path, ["model.vocab_size=320"])
    assert config.model.block == "transformer_xl"
    flops = count_flops(config.model, 512)
    assert flops.attention == sum(pair[0] == "s" for pair in config.model.sublayers) * 4 * config.model.hidden_size * (
        config.model.num_heads * config.model.head_size
    )
    assert flops.experts == len(config.model.moe_layers) * (
        config.model.router.active_experts(config.model) * 2 * config.model.hidden_size * config.model.ffn_hidden_size
    )


def test_biases_of_routers_count() -> None:
    """A gate's bias is added to its logits; a recurrent router's to what its cell reads and to its logits."""
    batch, _ = batch_of([[12]])
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    for router in ({**TOPK, "bias": True}, {**RECURRENT, "bias": True}):
        model = model_for(router=router)
        layer = model.layers["0"].mlp.router
        state = torch.zeros(1, 12, model.state_size, dtype=torch.float64)
        before = layer(x, state, batch, model.shared_router)
        if router["name"] == "topk":
            logits = x[0] @ layer.weight.T + layer.bias
        else:
            z = x[0] @ layer.projector.T + layer.projector_bias
            logits = model.shared_router(z, state[0]) @ layer.scorer.T + layer.scorer_bias
        wanted = logits.softmax(-1).topk(2)
        assert torch.equal(before.expert_ids.long(), wanted.indices)
        torch.testing.assert_close(before.weights, wanted.values / wanted.values.sum(-1, keepdim=True), rtol=1e-9, atol=0)


def test_adaptive_layers_are_those_with_a_c() -> None:
    acmoe = {"name": "acmoe", "plain_layers": 2}
    model = model_for(router=acmoe, layers="sgsfsgscsfsc", sizes={"num_layers": 6})
    adaptive = {name: block.mlp.router.adaptive for name, block in model.layers.items() if isinstance(block.mlp, MoE)}
    assert adaptive == {"0": False, "2": False, "3": True, "5": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"transformer_xl": {"layers": "sgsg"}}, "model.transformer_xl.layers=sgsg: must be s or . and then g, c, f or ."),
        ({"transformer_xl": {"layers": "sgsgsgs"}}, "model.transformer_xl.layers=sgsgsgs: must be"),
        ({"transformer_xl": {"layers": "sggssgsg"}}, "model.transformer_xl.layers=sggssgsg: must be"),
        ({"transformer_xl": {"layers": "sg..sgsg"}}, "not both ."),
        ({"transformer_xl": {"layers": "sfsfsfsf"}}, "leaves no block with experts"),
        ({"transformer_xl": {"layers": "sgsgscsg"}}, "router recurrent has an adaptive gate in blocks []"),
        ({"transformer_xl": {"layers": "sgsgscsg"}, "router": {"name": "acmoe"}}, "an adaptive gate in blocks [1, 2, 3]"),
        ({"transformer_xl": {"attn_type": "relative", "attn_span": 7}}, "model.transformer_xl.attn_span=7: attn_type=relative"),
        (
            {"transformer_xl": {"attn_type": "absolute"}, "hidden_size": 15, "num_heads": 3},
            "model.hidden_size=15: must be even",
        ),
        ({"qk_norm": True}, "model.qk_norm=True: only model.block=llama has it; leave it out"),
        ({"shared_expert_size": 8}, "model.shared_expert_size=8: only model.block=llama has it"),
        ({"moe_layer_freq": 2}, "model.moe_layer_freq=2: only model.block=llama has it"),
        (
            {"block": "llama", "transformer_xl": {"dropout": 0.1}},
            "model.transformer_xl.dropout=0.1: only model.block=transformer_xl has it",
        ),
    ],
)
def test_keys_that_do_not_go_together(content: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse({"model": {"block": "transformer_xl", **content}}, "test")
    assert message in str(error.value)


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "ep"])
def test_other_axes_are_refused_by_name(axis: str) -> None:
    with pytest.raises(UserError, match=f"parallel.{axis}=2: model.block=transformer_xl runs in one process or data parallel"):
        parse({"model": {"block": "transformer_xl"}, "parallel": {axis: 2}}, "test")


# Training


def run_of(prefix: str, **model: Any) -> dict[str, Any]:
    keys = {"attn_span": 16, "dropout": 0.1, "layers": "sgsfsgsg"}
    return merge(
        BASE,
        {
            "model": {
                "block": "transformer_xl",
                "transformer_xl": keys,
                "router": {"name": "recurrent", "router_size": 8},
                **model,
            },
            "data": {"train": prefix, "valid": prefix, "test": prefix},
        },
    )


def test_two_data_parallel_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    run = merge(run_of(bench.prefix), FP64)
    assert not bench.wrong(2, [Case("dp_shard=2", run)])


def train_and_evaluate(run: dict[str, Any]) -> dict[str, Any]:
    """Losses of 20 steps, and the sums of evaluations: rows alone, with memory, and as rows twice as long."""
    from moe_train.data.loader import EvalRows, Loader
    from moe_train.engine.native import NativeEngine
    from moe_train.parallel.mesh import start_world

    config = parse(run, "test")
    engine = NativeEngine(config, start_world(config))
    loader = Loader(config.data.train, seq_len=64, micro_batch_size=2, global_batch_size=8, seed=0)
    losses = []
    for _ in range(20):
        losses.append(engine.forward_backward(loader.next_step()).cross_entropy)
        engine.step()
    lengths = torch.ones(320, dtype=torch.int64)

    def nats(seq_len: int, rows: int, *memories: Memory) -> float:
        found = EvalRows(config.data.train, seq_len=seq_len, micro_batch_size=1, max_rows=rows)
        return engine.model.evaluate(found, lengths, memories).nats

    return {"losses": losses, "alone": nats(16, 8), "memory": nats(16, 8, Memory.start(1, 64)), "long": nats(128, 1)}


def test_it_trains_and_memory_joins_rows(tmp_path: Path) -> None:
    run = run_of(write_corpus(tmp_path / "corpus"))
    (found,) = run_ranks(1, train_and_evaluate, merge(run, {"train": {"steps": 20}, "optim": {"eps": 1e-8, "min_lr": 1e-2}}))
    losses = found["losses"]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert found["memory"] == pytest.approx(found["long"], rel=1e-5)
    assert abs(found["alone"] - found["long"]) > 1e-4 * found["long"]
