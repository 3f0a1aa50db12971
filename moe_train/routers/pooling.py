"""Decisions that tokens share, and the gate that makes them: what SMEAR and the estimators that it is compared with have in common.

A unit is what shares one decision: a token alone; a segment of at most `segment_size` tokens of one document; or, in the published
form, a whole document. The decision is made from features v [D]:

    token      the token's own hidden row
    segment    the mean hidden row of the segment before it in the document; a document's first segment has learned logits (after Lory,
               arXiv 2405.03133, whose own rule for the first segment lets a token see its successors)
    document   the mean hidden row of the document itself (SMEAR, arXiv 2306.03745, section 3): a token sees its future

    s = LN(v) LN(R)^T              R: [E, D]; both layer norms learned, the second one's gain starting at 0.01

The published second norm has a bias too. It adds the same number to all of a unit's logits, which a softmax does not see, so that its
gradient is rounding alone; it is left out.

Segments are cut by the position inside the document, so that a token's decision does not depend on what a row packs beside it. Sums of
hidden rows go over the ranks that share the rows, so that any sharding gives the same decisions; random numbers are those of the unit's
first position. While decoding, `Memory` is what later tokens need: the open segment's sum and its features.

Shapes: B rows, S positions, T = B * S_local tokens, D hidden, E experts, U units that this rank holds tokens of, G units of a row.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig, RouterConfig
from moe_train.errors import UserError
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.routing import BatchInfo, Router, Routing
from moe_train.routers.balance import count_choices

LEAK = "a token's routing is decided from the mean of its whole document, tokens after it included"


class PooledConfig(RouterConfig):
    """Keys of routers that decide once for each unit."""

    causal: bool = True
    """false = the published form: one decision for each document, from the mean of the document, so that a token sees its future"""
    segment_size: NonNegativeInt = 0
    """tokens that share a decision, made from the mean of as many tokens before them; 0 = each token decides for itself"""

    def leaks(self) -> list[str]:
        """The published form's leak."""
        return [] if self.causal else [f"model.router.causal=false: {LEAK}"]

    @property
    def by_segment(self) -> bool:
        """Whether a unit is a segment."""
        return self.causal and self.segment_size > 0


class Memory(NamedTuple):
    """What later tokens of a sequence need while decoding."""

    total: Tensor  # [B, D] the sum of the open segment's hidden rows
    features: Tensor  # [B, D] what the open segment's decision is made from
    first: Tensor  # [B] bool, whether it is its document's first segment


class Units(NamedTuple):
    """The units that this rank holds tokens of."""

    ids: Tensor  # [T] int64, each token's unit
    features: Tensor  # [U, D] fp32 (fp64 in an fp64 model); 0 where `first`
    first: Tensor  # [U] bool, whether nothing of the document came before (segments)
    places: Tensor  # [U] int64, b * S + s of the unit's first token
    memory: Memory | None = None  # after this batch (segments)


def find_units(x: Tensor, batch: BatchInfo, config: PooledConfig, memory: Memory | None = None) -> Units:
    """x [B, S_local, D] -> the units of its tokens. With `memory`, the batch continues the rows that gave it.

    The number of units comes to the host, because the sizes of what follows depend on it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if config.by_segment:
        return _segments(x.to(wide), batch, config.segment_size, memory)
    if not config.causal:
        if memory is not None:
            remedy = "decode with a full forward over the sequence, or train with causal=true"
            raise UserError(f"model.router.causal=false: {LEAK}, so no token can be decoded before the next; {remedy}")
        return _documents(x.to(wide), batch)
    places = _flat_places(batch)
    return Units(torch.arange(len(places), device=x.device), x.to(wide).flatten(0, 1), torch.zeros_like(places).bool(), places)


def document_units(batch: BatchInfo) -> tuple[Tensor, Tensor]:
    """The documents of this rank's tokens: each token's unit [T] and the units' places [U]."""
    return _present(batch, batch.doc_ids, _starts(batch.doc_ids))[1:]


def draw(batch: BatchInfo, places: Tensor, name: str, layer: int, n: int) -> Tensor:
    """Uniforms in (0, 1) for units at `places` [U]: [U, n] fp64, the same on every rank that holds tokens of a unit."""
    whole_rows = replace(batch, sharing=None)  # a unit may begin on another rank
    uniform = whole_rows.random(name, layer, n).flatten(0, 1)[places]
    return uniform.double() + 2.0**-25  # the middle of each of the 2^24 steps, so that every logarithm is finite


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniforms in (0, 1)."""
    return -(-uniform.log()).log()


def _documents(x: Tensor, batch: BatchInfo) -> Units:
    number = batch.doc_ids
    starts = _starts(number)
    ends = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], number.shape[1])], 1)
    means = _sums(x, batch, number, starts.shape[1]) / (ends - starts).clamp_min(1)[..., None]
    present, ids, places = _present(batch, number, starts)
    return Units(ids, means.flatten(0, 1)[present], torch.zeros_like(places).bool(), places)


def _segments(x: Tensor, batch: BatchInfo, size: int, memory: Memory | None) -> Units:
    number = (batch.positions % size == 0).cumsum(1)  # number 0 is the memory's open segment
    if memory is None:  # the row's first segment is open, with nothing before it
        number = number - 1
        zeros = x.new_zeros(x.shape[0], x.shape[2])
        memory = Memory(zeros, zeros, torch.ones_like(number[:, 0]).bool())
    starts = _starts(number)
    totals = _sums(x, batch, number, starts.shape[1])
    totals = torch.cat([memory.total[:, None] + totals[:, :1], totals[:, 1:]], 1)
    before = torch.cat([memory.features[:, None], totals[:, :-1] / size], 1)  # a segment that another one follows is full
    first = batch.positions.gather(1, starts.clamp_max(number.shape[1] - 1)) == 0
    first = torch.cat([memory.first[:, None], first[:, 1:]], 1)
    features = torch.where(first[..., None], 0, before)
    row, last = torch.arange(len(number), device=x.device), number[:, -1]
    after = Memory(totals[row, last], features[row, last], first[row, last])
    present, ids, places = _present(batch, number, starts)
    return Units(ids, features.flatten(0, 1)[present], first.flatten()[present], places, after)


def _starts(number: Tensor) -> Tensor:
    """The first position of each unit, from the units' numbers [B, S], which never fall: [B, G]; S where a row has fewer units."""
    count = int(number.max()) + 1
    return torch.searchsorted(number.contiguous(), torch.arange(count, device=number.device).repeat(len(number), 1))


def _sums(x: Tensor, batch: BatchInfo, number: Tensor, count: int) -> Tensor:
    """Sums of x [B, S_local, D] over the units `number` [B, S]: [B, G, D]. A product, because scattered additions have no order."""
    member = batch.here(number)[:, None] == torch.arange(count, device=x.device)[:, None]
    return batch.sum(member.to(x.dtype) @ x)


def _present(batch: BatchInfo, number: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Units that this rank holds tokens of, as b * G + number [U]; each token's index into them [T]; their first places [U]."""
    row = torch.arange(len(number), device=number.device)[:, None]
    present, ids = (row * starts.shape[1] + batch.here(number)).flatten().unique(return_inverse=True)
    return present, ids, (row * number.shape[1] + starts).flatten()[present]


def _flat_places(batch: BatchInfo) -> Tensor:
    rows, length = batch.positions.shape
    return batch.here(torch.arange(rows * length, device=batch.positions.device).view(rows, length)).flatten()


class Gate(nn.Module):
    """Logits from a unit's features; `normed` weights as SMEAR's router has, plain ones otherwise."""

    def __init__(self, config: PooledConfig, size: int, outputs: int, normed: bool = True) -> None:
        super().__init__()
        self.by_segment, self.normed = config.by_segment, normed
        self.weight = nn.Parameter(torch.empty(outputs, size))
        self.input_gain, self.input_bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        zero = Constant(0.0)
        self.initial: dict[str, Initial] = {"weight": Normal(0.01), "input_gain": Constant(1.0), "input_bias": zero}
        if normed:
            self.weight_gain = nn.Parameter(torch.empty(size))
            self.initial["weight_gain"] = Constant(0.01)
        if self.by_segment:
            self.first = nn.Parameter(torch.empty(outputs))
            self.initial["first"] = zero

    def normalise(self, features: Tensor) -> Tensor:
        """LN(v): features [U, D] -> [U, D]."""
        return F.layer_norm(features, features.shape[-1:], self.input_gain, self.input_bias)

    def forward(self, units: Units) -> Tensor:
        """Logits [U, outputs] in the features' dtype."""
        weight: Tensor = self.weight
        if self.normed:
            weight = F.layer_norm(weight, weight.shape[-1:], self.weight_gain)
        logits = F.linear(self.normalise(units.features), weight)
        return torch.where(units.first[:, None], self.first, logits) if self.by_segment else logits


class GatedRouter(Router):
    """A router whose gate has a logit for each expert."""

    def __init__(self, config: PooledConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        self.gate = Gate(config, model.hidden_size, model.num_experts)


@torch.no_grad()
def unit_stats(probs: Tensor, loads: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Detached sums over tokens with units `ids` [T]: what each expert got, from loads [U, E], and the entropy of probs [U, E]."""
    tokens = count_choices(ids[None], len(probs))[0].to(probs.dtype)
    return {"tokens_per_expert": tokens @ loads.to(probs.dtype), "entropy": tokens @ torch.special.entr(probs).sum(-1)}


def choose_one(units: Units, logits: Tensor, chosen: Tensor, scale: Tensor, state: Tensor, **losses: Tensor) -> Routing:
    """A Routing to one expert for each unit: logits [U, E], chosen [U] int64, scale [U] the weight of its result."""
    loads = F.one_hot(chosen, logits.shape[1])
    stats = unit_stats(logits.softmax(-1), loads, units.ids)
    weights, expert_ids = scale[units.ids, None], chosen[units.ids, None].int()
    return Routing(weights, expert_ids, state, losses, stats, units.memory)
