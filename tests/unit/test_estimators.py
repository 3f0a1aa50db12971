"""The estimators that SMEAR is compared with, against the published numbers, closed forms and loops, in fp64."""

import math
from dataclasses import replace

import pytest
import torch
from models import batch_of, config_of, decoder_of
from routing import ask, decode, layer_of, on_ranks, rows_of, run
from torch import Tensor
from torch.nn import functional as F

from moe_train.cli import parse
from moe_train.errors import UserError
from moe_train.flops import count_flops
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Segments
from moe_train.routers.dselect_k import expert_probs, regularizer, smooth_step
from moe_train.routers.reinforce import ReinforceRouter
from moe_train.routers.st_gumbel import StGumbelConfig, straight_through

POOLED = ["st_gumbel", "reinforce", "dselect_k", "ensemble"]
WIDE = {"spread": 0.7}


def expert(layer: MoE, x: Tensor, number: int) -> Tensor:
    """x [n, D] through one of the layer's experts."""
    gate_up, down = layer.experts.gate_up[number], layer.experts.down[number]
    return (F.silu(x @ gate_up[0].T) * (x @ gate_up[1].T)) @ down.T


def logits_of(layer: MoE, v: Tensor) -> Tensor:
    gate, size = layer.router.gate, (v.shape[-1],)
    weight = F.layer_norm(gate.weight, size, gate.weight_gain) if gate.normed else gate.weight
    return F.layer_norm(v, size, gate.input_gain, gate.input_bias) @ weight.T


def fix_logits(layer: MoE, logits: list[float]) -> Tensor:
    """Give every unit these logits; the leaf tensor that gets their gradient."""
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    layer.router.gate.forward = lambda units: leaf.expand(len(units.places), -1)
    return leaf


# straight-through Gumbel-softmax


def test_straight_through_by_hand() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    chosen, scale = straight_through(logits, 1.0)
    scale.sum().backward()
    assert chosen.tolist() == [0]
    assert scale.tolist() == [1.0]
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0.222695, -0.162803, -0.059892]], dtype=torch.float64), rtol=0, atol=5e-7
    )


def test_gumbel_samples_the_softmax_at_any_temperature() -> None:
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    batch, _ = batch_of([[5000], [5000]])
    found = []
    for temperature in (10.0, 0.5):
        layer = layer_of({"name": "st_gumbel", "temperature": temperature})
        leaf = fix_logits(layer, probs.log().tolist())
        routing = ask(layer.router, rows_of(batch), batch)
        assert (routing.weights == 1).all()
        found.append(routing.expert_ids)
        share = torch.bincount(found[-1].flatten(), minlength=4) / 10_000
        torch.testing.assert_close(share.double(), probs, rtol=0, atol=0.02)
        # q_i (1[i = e] - q_e) / tau of every token, with the router's own noise
        (grad,) = torch.autograd.grad(routing.weights.sum(), leaf)
        noise = -(-(batch.random("gumbel", 0, 4).double() + 2.0**-25).log()).log()
        q = ((probs.log() + noise.flatten(0, 1)) / temperature).softmax(-1)
        best = q.gather(1, routing.expert_ids.long())
        expected = (best * (F.one_hot(routing.expert_ids[:, 0].long(), 4) - q) / temperature).sum(0)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(*found)
    assert torch.bincount(found[0].flatten(), minlength=4).equal(routing.stats["tokens_per_expert"].long())


def test_gumbel_evaluation_takes_the_likeliest_unscaled() -> None:
    layer = layer_of({"name": "st_gumbel"}, **WIDE).eval()
    batch, _ = batch_of([[9], [9]])
    x = rows_of(batch)
    routing = ask(layer.router, x, batch)
    assert torch.equal(routing.expert_ids[:, 0].long(), logits_of(layer, x.flatten(0, 1)).argmax(-1))
    assert (routing.weights == 1).all()


@pytest.mark.parametrize(
    ("rate", "every", "compounds", "floor_at"),
    [(1e-6, 5000, True, 175_000), (1e-4, 1000, True, 8_000), (1e-6, 5000, False, 3.0e6), (1e-4, 1000, False, 30_000)],
)
def test_temperature_reaches_its_floor(rate: float, every: int, compounds: bool, floor_at: int) -> None:
    config = StGumbelConfig(temperature_rate=rate, temperature_every=every, temperature_compounds=compounds)
    temperature, found = 10.0, 0
    for step in range(0, int(floor_at * 1.1), every):  # the published loop, and the usual closed form
        temperature = max(temperature * math.exp(-rate * step) if compounds else 10.0 * math.exp(-rate * step), 0.5)
        assert config.temperature_at(step) == pytest.approx(temperature, rel=1e-9)
        assert config.temperature_at(step + every - 1) == config.temperature_at(step)
        found = found or (step if temperature == 0.5 else 0)
    assert found == pytest.approx(floor_at, rel=0.002)
    assert config.temperature_at(0) == 10.0


# REINFORCE


@pytest.mark.parametrize("baseline", [0.0, 2.0])
def test_reinforce_is_unbiased_by_hand(baseline: float) -> None:
    """p = (1/4, 3/4) and losses (1, 3): the mean estimate over both choices is the gradient of sum p L, whatever the baseline."""
    logits = torch.tensor([0.25, 0.75], dtype=torch.float64).log().requires_grad_()
    probs, losses = logits.softmax(-1), torch.tensor([1.0, 3.0], dtype=torch.float64)
    state = torch.stack([probs.log(), torch.full_like(probs, baseline)], -1)[None]  # each choice as a token
    policy = [ReinforceRouter.readout(None, state[:, i : i + 1], losses[None, i : i + 1])["policy"] for i in range(2)]
    (grad,) = torch.autograd.grad(
        sum(p.detach() * term for p, term in zip(probs, policy, strict=True)), logits, retain_graph=True
    )
    (true,) = torch.autograd.grad((probs * losses).sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([-0.375, 0.375], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, true, rtol=0, atol=1e-12)


def test_reinforce_is_unbiased_through_the_router() -> None:
    """20,000 sampled tokens, whose loss depends on the expert: within four standard errors of the true gradient."""
    losses = torch.tensor([1.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    batch, _ = batch_of([[5000]] * 4)
    layer = layer_of({"name": "reinforce"})
    leaf = fix_logits(layer, [0.3, -0.2, 0.5, 0.0])
    routing = ask(layer.router, rows_of(batch), batch)
    token_loss = losses[routing.expert_ids.long()].view(4, 5000)
    (grad,) = torch.autograd.grad(layer.router.readout(layer.router.config, routing.state, token_loss)["policy"] / 20_000, leaf)
    probs = leaf.softmax(-1)
    (true,) = torch.autograd.grad((probs * losses).sum(), leaf)
    terms = losses[:, None] * (torch.eye(4, dtype=torch.float64) - probs.detach())  # of each choice; the baseline is near 0
    error = ((probs[:, None] * (terms - true) ** 2).sum(0) / 20_000).sqrt()
    assert ((grad - true).abs() < 4 * error).all()
    assert (grad.abs() > 0.01).any()


def test_reinforce_policy_moves_no_baseline() -> None:
    state = torch.tensor([[[-1.0, 0.5], [-2.0, 1.0]]], requires_grad=True)
    (grad,) = torch.autograd.grad(ReinforceRouter.readout(None, state, torch.tensor([[3.0, 0.0]]))["policy"], state)
    assert grad.tolist() == [[[2.5, 0.0], [0.0, 0.0]]]  # the second token has no target


def test_reinforce_baseline_loss_is_hubers() -> None:
    for error, expected in ((0.5, 0.125), (2.0, 1.5), (-2.0, 1.5)):
        state = torch.tensor([[[-1.0, 3.0 + error]]])
        assert float(ReinforceRouter.readout(None, state, torch.tensor([[3.0]]))["baseline"]) == pytest.approx(expected)


def test_reinforce_columns_are_those_of_the_layers_with_experts() -> None:
    """ln p of the choice and the baseline, of each layer with experts; tokens without a target earn nothing."""
    model = decoder_of(config_of({"name": "reinforce"}, num_layers=4, moe_layer_freq=[0, 1, 0, 1]).model)
    batch, targets = batch_of([[7, 5]])
    assert model.state_size == 4
    seen: dict[str, tuple] = {}
    for name, block in model.layers.items():
        if isinstance(block.mlp, MoE):
            block.mlp.router.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0], out)}))
    output = model(batch, targets)
    state = output.carry.state
    terms = []
    for column, name in ((0, "1"), (2, "3")):
        router, x, routing = seen[name]
        normed = F.layer_norm(x[0], (16,))
        weight = F.layer_norm(router.gate.weight, (16,)) * router.gate.weight_gain
        log_probs = (normed @ weight.T).log_softmax(-1)
        torch.testing.assert_close(state[0, :, column], log_probs.gather(1, routing.expert_ids.long())[:, 0], rtol=1e-9, atol=0)
        value = (normed @ router.baseline_in.T @ router.baseline_out.T)[:, 0] + router.baseline_bias
        torch.testing.assert_close(state[0, :, column + 1], value, rtol=1e-9, atol=1e-12)
        gain = output.token_loss[0] - value
        real = targets[0] >= 0
        terms.append(
            ((state[0, :, column] * gain)[real].sum(), F.huber_loss(value[real], output.token_loss[0][real], reduction="sum"))
        )
    found = ReinforceRouter.readout(None, state, output.token_loss)
    for i, name in enumerate(("policy", "baseline")):
        assert float(found[name].detach()) == pytest.approx(float((terms[0][i] + terms[1][i]).detach()) / 2, rel=1e-9)


def test_reinforce_baseline_learns_from_its_own_loss_alone() -> None:
    weights = {"policy_weight": 0.0, "entropy_weight": 0.0}
    plain, learning = (decoder_of(config_of({"name": "reinforce", **weights, "baseline_weight": w}).model) for w in (0.0, 1.0))
    batch, targets = batch_of([[7, 5]])
    for model in (plain, learning):
        model(batch, targets).loss.backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), learning.named_parameters(), strict=True):
        if "baseline" in name:
            assert float(p.grad.abs().max()) == 0.0
            assert float(q.grad.abs().max()) > 0.0
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize(("weight", "rises"), [(5e-4, True), (-5e-4, False)])
def test_reinforce_entropy_bonus_and_the_published_sign(weight: float, rises: bool) -> None:
    layer = layer_of({"name": "reinforce", "entropy_weight": weight})
    leaf = fix_logits(layer, [1.0, 0.0, 0.0, 0.0])
    batch, _ = batch_of([[10]])
    entropy = ask(layer.router, rows_of(batch), batch).losses["entropy"]
    assert float(entropy.detach()) == pytest.approx(10 * float(torch.special.entr(leaf.softmax(-1)).sum().detach()))
    (grad,) = torch.autograd.grad(layer.router.config.loss_weights()["entropy"] * entropy, leaf)
    assert (float(grad[0]) > 0) == rises  # descent lowers the largest logit where the entropy is to rise


# DSelect-k


def test_dselect_by_hand() -> None:
    z = torch.tensor([[[0.25, -0.25]]], dtype=torch.float64)
    bits = smooth_step(z, 1.0)
    assert bits.tolist() == [[[0.84375, 0.15625]]]
    probs = expert_probs(bits, 4)
    torch.testing.assert_close(
        probs, torch.tensor([[[0.131836, 0.711914, 0.024414, 0.131836]]], dtype=torch.float64), rtol=0, atol=5e-7
    )
    assert float(regularizer(probs)) == pytest.approx(0.866798, abs=5e-6)  # with its 1e-6 inside the logarithm
    assert float(regularizer(probs[..., :3])) == pytest.approx(0.866798 - 0.267125 + 1 / 0.868164, abs=5e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_smooth_step_is_smooth(gamma: float) -> None:
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64).mul(gamma).requires_grad_()
    values = smooth_step(z, gamma)
    values.sum().backward()
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.grad, torch.tensor([0, 0, 1.5 / gamma, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    inside = torch.linspace(-0.499, 0.499, 9, dtype=torch.float64).mul(gamma).requires_grad_()
    u = inside.detach() / gamma
    torch.testing.assert_close(smooth_step(inside, gamma).detach(), -2 * u**3 + 1.5 * u + 0.5, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda t: smooth_step(t, gamma), inside)


@pytest.mark.parametrize("selectors", [1, 3])
@pytest.mark.parametrize("experts", [4, 5])
def test_dselect_by_loops(selectors: int, experts: int) -> None:
    layer = layer_of({"name": "dselect_k", "top_k": selectors, "gamma": 4.0}, spread=0.3, num_experts=experts)
    batch, _ = batch_of([[6], [2, 4]])
    x = rows_of(batch)
    routing = ask(layer.router, x, batch)
    bits = math.ceil(math.log2(experts))
    logits = logits_of(layer, x.flatten(0, 1)).detach()
    expected, penalty = torch.zeros(12, experts, dtype=torch.float64), 0.0
    for t in range(12):
        share = logits[t, selectors * bits :].softmax(-1) if selectors > 1 else torch.ones(1, dtype=torch.float64)
        for j in range(selectors):
            s = smooth_step(logits[t, j * bits : (j + 1) * bits], 4.0)
            r = [math.prod(float(s[b]) if e >> b & 1 else 1 - float(s[b]) for b in range(bits)) for e in range(experts)]
            expected[t] += share[j] * torch.tensor(r, dtype=torch.float64)
            penalty += sum(-p * math.log(p + 1e-6) for p in r) + (1 / sum(r) if experts == 5 else 0.0)
    torch.testing.assert_close(routing.weights.detach(), expected, rtol=1e-9, atol=1e-12)
    assert float(routing.losses["regularizer"].detach()) == pytest.approx(penalty, rel=1e-9)
    torch.testing.assert_close(
        run(layer, x, batch).flatten(0, 1),
        sum(expected[:, [e]] * expert(layer, x.flatten(0, 1), e) for e in range(experts)),
        rtol=1e-9,
        atol=1e-12,
    )


def test_dselect_skips_experts_without_weight() -> None:
    """Saturated codes: one expert for each token, and empty slots for the others."""
    layer = layer_of({"name": "dselect_k", "gamma": 1e-3}, **WIDE)
    batch, _ = batch_of([[9]])
    x = rows_of(batch)
    routing = ask(layer.router, x, batch)
    logits = logits_of(layer, x[0])
    number = (logits > 0).long() @ torch.tensor([1, 2])
    assert ((routing.expert_ids >= 0) == F.one_hot(number, 4).bool()).all()
    torch.testing.assert_close(
        run(layer, x, batch)[0], torch.stack([expert(layer, v, int(e)) for v, e in zip(x[0], number, strict=True)])
    )
    assert float(routing.losses["regularizer"].detach()) == pytest.approx(0.0, abs=1e-4)


def test_dselect_without_mass_on_an_expert_stays_finite() -> None:
    probs = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)  # all mass on the code that has no expert
    regularizer(probs).sum().backward()
    assert probs.grad.isfinite().all()


# ensemble and monolith


def test_ensemble_by_loops() -> None:
    layer = layer_of({"name": "ensemble"}, **WIDE)
    batch, _ = batch_of([[6], [2, 4]])
    x = rows_of(batch)
    probs = logits_of(layer, x.flatten(0, 1)).softmax(-1)
    expected = sum(probs[:, [e]] * expert(layer, x.flatten(0, 1), e) for e in range(4))
    torch.testing.assert_close(run(layer, x, batch).flatten(0, 1), expected, rtol=1e-10, atol=1e-13)


def test_monolith_is_one_wide_mlp() -> None:
    layer = layer_of({"name": "monolithic"})
    batch, _ = batch_of([[6]])
    x = rows_of(batch)
    gate, up = layer.experts.gate_up.unbind(1)
    wide = F.silu(x @ gate.flatten(0, 1).T) * (x @ up.flatten(0, 1).T)
    torch.testing.assert_close(
        run(layer, x, batch), wide @ layer.experts.down.transpose(0, 1).flatten(1).T, rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize(
    ("name", "experts"), [("ensemble", 4), ("monolithic", 4), ("dselect_k", 4), ("st_gumbel", 1), ("smear", 1)]
)
def test_flops_of_the_experts_that_a_token_visits(name: str, experts: int) -> None:
    flops = count_flops(config_of({"name": name}).model, 32)
    assert flops.experts == 3 * experts * 3 * 16 * 8


def test_flops_of_merging_and_of_two_passes() -> None:
    plain, smear, adamix = (count_flops(config_of({"name": name}).model, 32) for name in ("monolithic", "smear", "adamix"))
    assert smear.router == 3 * ((4 * 16 + 4 * 3 * 16 * 8) // 64)  # gate and merge, once for each segment of 64
    assert (adamix.attention, adamix.head, adamix.causal) == (
        2 * plain.attention,
        2 * plain.head,
        2 * (plain.causal - 6 * 3 * 3 * 3 * 16 * 8),
    )


# labels


def labelled(rows: list[list[int]], labels: list[list[int]]) -> BatchInfo:
    batch, _ = batch_of(rows)
    per_token = [torch.repeat_interleave(torch.tensor(of_row), torch.tensor(n)) for of_row, n in zip(labels, rows, strict=True)]
    return replace(batch, labels=torch.stack(per_token))


@pytest.mark.parametrize(("named", "expected"), [([], [0, 3, 1, 2]), ([2, 0], [2, 3, 1, 2])])
def test_tag_follows_the_labels(named: list[int], expected: list[int]) -> None:
    layer = layer_of({"name": "tag", "experts_of_labels": named})
    batch = labelled([[4, 2], [3, 3]], [[0, 3], [5, 2]])
    routing = ask(layer.router, rows_of(batch), batch)
    assert (
        routing.expert_ids.flatten().tolist() == [expected[0]] * 4 + [expected[1]] * 2 + [expected[2]] * 3 + [expected[3]] * 3
    )
    assert (routing.weights == 1).all()
    assert int(routing.stats["tokens_per_expert"].sum()) == 12


def test_tag_names_experts_that_exist() -> None:
    with pytest.raises(UserError, match=r"model.router.experts_of_labels=\[1, 8\]: .*num_experts=8"):
        parse({"model": {"router": {"name": "tag", "experts_of_labels": [1, 8]}}}, "run")


def test_latent_skills_by_loops() -> None:
    layer = layer_of({"name": "latent_skills", "num_labels": 3}, spread=0.3)
    batch = labelled([[4, 2], [3, 3]], [[0, 2], [2, 4]])
    x = rows_of(batch)
    for training in (True, False):
        layer.train(training)
        out = run(layer, x, batch)
        uniform = batch.random("skills", 0, 4).double() + 2.0**-25
        for row, part, label in ((0, slice(0, 4), 0), (0, slice(4, 6), 2), (1, slice(0, 3), 2), (1, slice(3, 6), 1)):
            logits = 10 * layer.router.skills[label]
            if training:
                u = uniform[row, part.start]
                logits = logits + u.log() - (1 - u).log()
            m = logits.sigmoid()
            p = m / (m.sum() + 1e-12)
            gate_up = torch.einsum("e,eijk->ijk", p, layer.experts.gate_up)
            y = F.silu(x[row, part] @ gate_up[0].T) * (x[row, part] @ gate_up[1].T)
            expected = y @ torch.einsum("e,eij->ij", p, layer.experts.down).T
            torch.testing.assert_close(out[row, part], expected, rtol=1e-9, atol=1e-12)


def test_latent_skills_start_near_uniform_and_move_ten_times_as_fast() -> None:
    layer = layer_of({"name": "latent_skills"})
    skills = layer.router.skills
    assert float(skills.detach().abs().max()) <= 1e-4  # logits in U(-1e-3, 1e-3)
    batch, _ = batch_of([[6]])
    before = 10 * skills.detach().clone()
    optimizer = torch.optim.Adam([skills], lr=1e-3)
    (1e9 * run(layer, rows_of(batch), batch)).square().sum().backward()  # far above Adam's epsilon
    optimizer.step()
    moved = (10 * skills.detach() - before)[0].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)


# AdaMix


def test_adamix_draws_experts_for_each_row_and_averages_them_afterwards() -> None:
    layer = layer_of({"name": "adamix"})
    batch, _ = batch_of([[5]] * 40)
    x = rows_of(batch)
    out, pairs = run(layer, x, batch), set()
    drawn = (batch.random("experts", 0, 2)[:, 0] * 4).long().tolist()
    for row, (i, j) in enumerate(drawn):
        gate_up = layer.experts.gate_up[i]
        expected = (F.silu(x[row] @ gate_up[0].T) * (x[row] @ gate_up[1].T)) @ layer.experts.down[j].T
        torch.testing.assert_close(out[row], expected, rtol=1e-10, atol=1e-13)
        pairs.add((i, j))
    assert len(pairs) > 10  # of 16: two independent draws
    mean_up, mean_down = layer.experts.gate_up.mean(0), layer.experts.down.mean(0)
    expected = (F.silu(x @ mean_up[0].T) * (x @ mean_up[1].T)) @ mean_down.T
    torch.testing.assert_close(run(layer.eval(), x, batch), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [[[7, 5], [12]], [[12], [12]]])
def test_adamix_loss_by_hand(lengths: list[list[int]], tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two separate passes with the draws of the two copies; cross entropy and consistency from whole logits."""
    model = decoder_of(config_of({"name": "adamix", "consistency_weight": 0.7}, tie_embeddings=tied).model)
    monkeypatch.setattr("moe_train.model.layers.LOGITS_AT_ONCE", 5 * 32)  # several chunks, the last one short
    batch, targets = batch_of(lengths)
    output = model(batch, targets)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = [model(replace(batch, rows=rows)).logits.flatten(0, 1) for rows in (batch.rows, -1 - batch.rows)]
    assert not torch.equal(*logits)
    p, q = (x.log_softmax(-1) for x in logits)
    real = targets.flatten() >= 0
    token_loss = sum(F.nll_loss(x, targets.flatten(), reduction="none") for x in (p, q)) / 2
    apart = (F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(p, q, log_target=True, reduction="none")).sum(-1) / 2
    loss = (token_loss.sum() + 0.7 * apart[real].sum()) / batch.target_count
    loss.backward()
    assert float(apart[real].sum().detach()) > 0
    assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-10)
    torch.testing.assert_close(output.token_loss.flatten(), token_loss.detach(), rtol=1e-9, atol=1e-12, check_dtype=False)
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-8, atol=1e-13)


def test_adamix_evaluates_in_one_pass() -> None:
    model = decoder_of(config_of({"name": "adamix"}).model).eval()
    batch, targets = batch_of([[7, 5]])
    output = model(batch, targets)
    expected = F.cross_entropy(model(batch).logits[0], targets[0], reduction="none")
    torch.testing.assert_close(output.token_loss[0], expected, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_twice_copies_documents() -> None:
    batch, _ = batch_of([[7, 5], [12]])
    both = batch.twice()
    assert both.rows.unique().numel() == 4
    assert torch.equal(both.segments.mask, torch.cat([batch.segments.mask] * 2))
    assert (both.token_count, both.target_count) == (48, 48)
    bounds = replace(batch, segments=Segments(bounds=torch.tensor([0, 7, 12, 24], dtype=torch.int32))).twice().segments.bounds
    assert bounds.tolist() == [0, 7, 12, 24, 31, 36, 48]
    assert bounds.dtype == torch.int32


@pytest.mark.parametrize("axis", ["pp", "tp", "cp"])
def test_adamix_is_refused_where_the_passes_cannot_meet(axis: str) -> None:
    with pytest.raises(UserError, match=rf"parallel.{axis}=2: router adamix compares two passes"):
        parse({"model": {"router": {"name": "adamix"}}, "parallel": {axis: 2}}, "run")


# units of tokens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("segment_size", [0, 3])
@pytest.mark.parametrize("name", POOLED)
def test_pooled_estimators_are_causal(name: str, segment_size: int, training: bool) -> None:
    layer = layer_of({"name": name, "segment_size": segment_size}, **WIDE).train(training)
    batch, _ = batch_of([[7, 3], [10]])
    x = rows_of(batch)
    before, moved = run(layer, x, batch).detach(), 0
    for position in range(10):
        other = x.clone()
        other[0, position] = -2 * other[0, position].flip(0)
        changed = (run(layer, other, batch).detach() - before).abs().amax(-1) > 1e-12
        segment = {0: range(3, 6), 1: range(3, 6), 2: range(3, 6), 3: [6], 4: [6], 5: [6]}.get(position, [])
        allowed = {position, *(segment if segment_size else [])}
        found = {t for _, t in changed.nonzero().tolist()}
        assert position in found
        assert found <= allowed
        assert not changed[1].any()
        moved += len(found - {position})
    assert (moved > 0) == (segment_size > 0)


@pytest.mark.parametrize("name", POOLED)
def test_pooled_estimators_decode(name: str) -> None:
    for keys in ({}, {"segment_size": 3}):
        layer = layer_of({"name": name, **keys}, **WIDE).eval()
        batch, _ = batch_of([[10], [4, 6]])
        x = rows_of(batch)
        torch.testing.assert_close(decode(layer, x, batch, [1] * 10), run(layer, x, batch), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", POOLED)
def test_the_published_units_are_documents(name: str) -> None:
    layer = layer_of({"name": name, "causal": False}, **WIDE)
    batch, _ = batch_of([[7, 3]])
    weights = ask(layer.router, rows_of(batch), batch).weights
    assert (weights[:7] == weights[0]).all()
    assert (weights[7:] == weights[7]).all()
    x = rows_of(batch)
    means = torch.stack([x[0, :7].mean(0), x[0, 7:].mean(0)])
    if name == "ensemble":
        torch.testing.assert_close(weights[[0, 7]], logits_of(layer, means).softmax(-1), rtol=1e-10, atol=0)
    assert "causal=false" in layer.router.config.leaks()[0]


@pytest.mark.parametrize("keys", [{}, {"segment_size": 4}, {"causal": False}])
@pytest.mark.parametrize("name", POOLED)
def test_sharding_changes_nothing(name: str, keys: dict) -> None:
    whole, _ = batch_of([[7, 5], [12]])

    def work(batch: BatchInfo) -> tuple:
        layer = layer_of({"name": name, **keys}, **WIDE)
        x = batch.here(rows_of(whole)).contiguous().requires_grad_()
        routing = ask(layer.router, x, batch)
        out = layer.mix(x, routing, layer.plan(routing))
        loss = (out * batch.here(rows_of(whole, seed=1))).sum() + 0.1 * sum(routing.losses.values(), torch.zeros(()))
        (loss + (routing.state**2).sum()).backward()
        sums = [*(p.grad for p in layer.parameters()), *routing.stats.values(), *(v.detach() for v in routing.losses.values())]
        return batch.whole(out), batch.whole(x.grad), batch.whole(routing.state), sums

    expected, found = work(whole), on_ranks(torch.tensor([[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]), whole, work)
    for *rows, _ in found:
        torch.testing.assert_close(tuple(rows), expected[:3], rtol=1e-9, atol=1e-12)
    for value, *parts in zip(expected[3], *(sums for *_, sums in found), strict=True):
        torch.testing.assert_close(sum(parts), value, rtol=1e-9, atol=1e-12)
