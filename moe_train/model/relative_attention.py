"""Attention that knows positions by their distance, as the papers' small models have it, over rows and what is kept of earlier ones.

    table     a_ts = q_t . (k_s + p_{t-s})                                 1 <= t - s <= span        (arXiv 1905.07799, section 2)
    relative  a_ts = (q_t + u) . k_s + (q_t + v) . W r_{t-s}               0 <= t - s                (arXiv 1901.02860, section 3.3)
    absolute  a_ts = q_t . k_s, positions being added to the embeddings    0 <= t - s                (arXiv 1706.03762, section 3.5)

w_t = softmax(a_t / sqrt(d)). p: [span, d], one learned table for all layers and heads; u, v: [H, d], one for all layers; W: a matrix
for each layer; r: sinusoids. With `table` a token does not see itself, and each of its `span` slots that has no row (before a
document's start) is a row of zeros: its score is q_t . p_{t-s}, its value 0. So is it in the code that RMoE and ACMoE build on
(github.com/giangdip2410/CompeteSMoE), whose memory starts as zeros.

A query sees back to the start of its document, which its position tells, so a row may go on with a document of the row before.

Shapes: B rows, S positions, n rows kept from before, L = n + S keys, N span, H heads, d head width, D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_train.config import ModelConfig
from moe_train.model.dropout import drop
from moe_train.model.init import Initial, Normal
from moe_train.model.layers import Embedding, Linear
from moe_train.model.routing import BatchInfo


class Places(NamedTuple):
    """Where the keys of a forward are, seen from its queries; the same for all layers."""

    visible: Tensor  # [B or 1, 1, S, L] bool
    empty: Tensor | None = None  # [B or 1, 1, S, N] bool, the distances 1 ... N at which there is no row (`table`)
    columns: Tensor | None = None  # [L] int64, entries of the table for distances L - 1 ... 0, some of them never seen
    rows: Tensor | None = None  # the table [N, d], or sinusoids [L, D] of distances L - 1 ... 0 (`relative`)
    content_bias: Tensor | None = None  # u [H, 1, d]
    position_bias: Tensor | None = None  # v [H, 1, d]


class Positions(nn.Module):
    """What all layers share: the table, or u and v. For `relative` and `absolute` also what becomes of the embeddings."""

    content_bias: nn.Parameter
    position_bias: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.kind = config, config.transformer_xl.attn_type
        self.initial: dict[str, Initial] = {}
        if self.kind == "table":
            self.table = Embedding(config.transformer_xl.attn_span, config.head_size, config.init_std)
        if self.kind == "relative":
            for name in ("content_bias", "position_bias"):  # one-dimensional, as every parameter that is not decayed
                self.register_parameter(name, nn.Parameter(torch.empty(config.num_heads * config.head_size)))
                self.initial[name] = Normal(config.init_std)

    def embed(self, hidden: Tensor, batch: BatchInfo) -> Tensor:
        """What the first layer gets for embeddings [B, S, D]: these, or as in Transformer-XL's code sqrt(D) times, with dropout."""
        if self.kind == "table":
            return hidden
        hidden = hidden * self.config.hidden_size**0.5
        if self.kind == "absolute":
            hidden = hidden + sinusoids(batch.positions, self.config.hidden_size).to(hidden.dtype)
        return drop(hidden, batch, self.config.transformer_xl.dropout if self.training else 0.0, 0, "embedding_dropout")

    def forward(self, batch: BatchInfo, kept: int) -> Places:
        """Places of a batch that comes after `kept` rows."""
        index = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        distances = kept + index[:, None] - torch.arange(kept + len(index), device=index.device)
        # Without documents to tell apart positions do not matter: a query sees all of its row.
        far = index[None] if batch.segments is None and not kept else batch.positions
        visible = (distances >= (self.kind == "table")) & (distances <= far[..., None])
        if self.kind == "table":
            return self._by_table(visible, distances, torch.minimum(far, kept + index))
        rows = u = v = None
        if self.kind == "relative":
            rows = sinusoids(distances[-1], self.config.hidden_size).to(self.content_bias.dtype)
            u, v = (bias.view(-1, 1, self.config.head_size) for bias in (self.content_bias, self.position_bias))
        return Places(visible[:, None], rows=rows, content_bias=u, position_bias=v)

    def _by_table(self, visible: Tensor, distances: Tensor, far: Tensor) -> Places:
        """visible [B or 1, S, L], distances [S, L], far [B or 1, S]: the farthest row that is there."""
        span = self.config.transformer_xl.attn_span
        slots = torch.arange(1, span + 1, device=far.device)
        columns = distances[-1].clamp(1, span) - 1
        return Places((visible & (distances <= span))[:, None], (slots > far[..., None])[:, None], columns, self.table.weight)


class RelativeAttention(nn.Module):
    """Self-attention of one layer, without biases in its matrices; see the module's docstring."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, std, width = config.hidden_size, config.init_std, config.num_heads * config.head_size
        self.head_dim, self.layer = config.head_size, layer
        self.q, self.k, self.v = (Linear(size, width, std) for _ in range(3))
        self.out = Linear(width, size, std)
        kind = config.transformer_xl.attn_type
        self.position = Linear(size, width, std) if kind == "relative" else None
        self.dropout = config.transformer_xl.dropout if kind == "table" else 0.0

    def forward(self, x: Tensor, rows: Tensor, batch: BatchInfo, places: Places) -> Tensor:
        """Queries x [B, S, D], and rows [B, L, D] that they see: those kept from before, then x -> [B, S, D]."""
        q, k, v = (self._heads(y) for y in (self.q(x), self.k(rows), self.v(rows)))
        scores = (q if places.content_bias is None else q + places.content_bias) @ k.mT
        empty = scores[..., :0]
        if places.empty is not None:
            assert places.rows is not None
            by_distance = q @ places.rows.mT
            scores = scores + shift(by_distance[..., places.columns])
            empty = by_distance.masked_fill(~places.empty, float("-inf"))
        elif self.position is not None:
            assert places.rows is not None
            assert places.position_bias is not None
            scores = scores + shift((q + places.position_bias) @ self._heads(self.position(places.rows)).mT)
        scores = torch.cat([scores.masked_fill(~places.visible, float("-inf")), empty], -1)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.head_dim**0.5
        weights = wide.softmax(-1)[..., : rows.shape[1]].to(x.dtype)
        rate = self.dropout if self.training else 0.0
        weights = drop(weights.transpose(1, 2), batch, rate, self.layer, "attention_dropout").transpose(1, 2)
        return self.out((weights @ v).transpose(-3, -2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """[..., S, H * d] -> [..., H, S, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)


def shift(scores: Tensor) -> Tensor:
    """scores [..., S, L] of the distances L - 1 ... 0 -> by key: query i is row L - S + i, at distance L - S + i - j from key j.

    Transformer-XL's appendix B: each row moves one further than the row above. Keys after the query get anything.
    """
    *front, queries, keys = scores.shape
    return F.pad(scores, (1, 0)).flatten(-2)[..., queries:].reshape(*front, queries, keys)


def sinusoids(places: Tensor, size: int) -> Tensor:
    """[...] -> [..., size] fp64: sines, then cosines, of `places` times 10000^(-2i / size)."""
    exponents = torch.arange(0, size, 2, device=places.device, dtype=torch.float64) / size
    angles = places.double()[..., None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], -1)
