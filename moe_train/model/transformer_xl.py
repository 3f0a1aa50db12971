"""The block of the papers' small models (`model.block: transformer_xl`): post-norm layers of attention by distance and ReLU experts.

One layer, for hidden rows x (RMoE, arXiv 2408.06793, and ACMoE, arXiv 2502.15315, build on github.com/giangdip2410/CompeteSMoE):

    u = LN_a(x + Attention(x))
    m = LN_i(u + Drop(MoE(u)))                    `residual: double`: a norm and a residual around the experts,
    y = LN_m(u + m)                               and both again around that
    y = LN_m(u + Drop(MoE(u)))                    `residual: single` (VQMoE, arXiv 2411.19402, section 3)
    y = LN_d(u + MLP(u))                          a dense layer

`layers` says which of these a layer has. The router reads what the experts get, u. There is no final norm, and the head has a bias.
With `residual: double` a layer also has the norms of the sublayers that it lacks, which nothing uses or trains: the published
layers have them, and the published totals of parameters count them.

Dropout: of attention weights (`table`), or of embeddings and what attention, MLP and the last layer give (others, as in
Transformer-XL's code, but for its dropout of sinusoids); of the hidden units of experts and MLPs, and of what the experts add.

`Memory` is segment-level recurrence (Transformer-XL, arXiv 1901.02860, section 3.2). It is the `Cache` of this block: what each layer
got for earlier columns, which later queries see. A forward gets it and returns it; no module keeps it.

Shapes: B rows, S positions, n rows kept, D hidden, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.cache import Cache, Past
from moe_train.model.dropout import ExpertDropout, drop
from moe_train.model.init import Constant, Initial, Normal
from moe_train.model.layers import Head, LayerNorm
from moe_train.model.moe import LayerStats, MoE, run_directly
from moe_train.model.relative_attention import Places, RelativeAttention
from moe_train.model.routing import BatchInfo, Carry


class FeedForward(nn.Module):
    """Dense MLP W_down relu(W_up x + b) + c."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.dense_size
        self.up, self.up_bias = nn.Parameter(torch.empty(width, size)), nn.Parameter(torch.empty(width))
        self.down, self.down_bias = nn.Parameter(torch.empty(size, width)), nn.Parameter(torch.empty(size))
        self.initial: dict[str, Initial] = {"up": Normal(config.init_std), "down": Normal(config.init_std)}
        self.initial |= {"up_bias": Constant(0.0), "down_bias": Constant(0.0)}
        self.dropout, self.layer = config.transformer_xl.dropout, layer

    def forward(self, x: Tensor, batch: BatchInfo) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        hidden = F.linear(x, self.up, self.up_bias).relu()
        hidden = drop(hidden, batch, self.dropout if self.training else 0.0, self.layer, "mlp_dropout")
        return F.linear(hidden, self.down, self.down_bias)


class TransformerXLBlock(nn.Module):
    """One layer; see the module's docstring. `run_attention` and `run_mlp` are replaced from outside, as those of the llama block."""

    run_attention: Callable[..., Any]
    run_mlp: Callable[..., Any]

    def __init__(self, config: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        attends, mixes = list(config.sublayers[layer])
        double = config.transformer_xl.residual == "double"
        self.attention = RelativeAttention(config, layer) if attends == "s" else None
        self.mlp: MoE | FeedForward | None = None
        if mixes in "gc":
            self.mlp = MoE(config, layer, kernels)
        elif mixes == "f":
            self.mlp = FeedForward(config, layer)
        self.attention_norm = _norm(config, attends == "s", double)
        self.moe_norm = _norm(config, mixes in "gc", double)
        self.dense_norm = _norm(config, mixes == "f", double)
        self.inner_norm = _norm(config, mixes in "gc" and double, False)
        self.run_attention = self.run_mlp = run_directly
        self.config, self.layer, self.last = config, layer, layer == config.num_layers - 1

    def forward(
        self, carry: Carry, batch: BatchInfo, places: Places, shared: nn.Module | None, past: Past | None = None
    ) -> tuple[Carry, LayerStats, Past | None]:
        """One layer: a new carry, the layer's statistics and, where rows are kept, `past` with these."""
        stats: LayerStats = {}
        hidden, past = self.run_attention(self._attend, carry.hidden, batch, places, past)
        if isinstance(self.mlp, MoE):
            hidden_drop = ExpertDropout(batch, self._rate(), self.layer) if self._rate() else None
            memory = None if past is None else past.memory
            out, carry, stats, memory = self.mlp(hidden, carry, batch, shared, self.run_mlp, memory, hidden_drop)
            past = None if past is None else past._replace(memory=memory)
            out = self._drop(out, batch, "moe_dropout")
            if self.inner_norm is not None:
                out = self.inner_norm(hidden + out)
            hidden = self._normed(self.moe_norm, hidden + out)
        elif self.mlp is not None:
            out = self._drop_plain(self.run_mlp(self.mlp, hidden, batch), batch, "mlp_output_dropout")
            hidden = self._normed(self.dense_norm, hidden + out)
        if self.last:
            hidden = self._drop_plain(hidden, batch, "last_dropout")
        return carry._replace(hidden=hidden), stats, past

    def _attend(self, x: Tensor, batch: BatchInfo, places: Places, past: Past | None) -> tuple[Tensor, Past | None]:
        """The sublayer of attention, and `past` with its rows x [B, S, D]."""
        if self.attention is None:
            return x, past
        past = None if past is None else past.extend((x,))
        rows = x if past is None or past.seen is None else past.seen[0]
        out = self._drop_plain(self.attention(x, rows, batch, places), batch, "attention_output_dropout")
        return self._normed(self.attention_norm, x + out), past

    def _drop(self, x: Tensor, batch: BatchInfo, name: str) -> Tensor:
        return drop(x, batch, self._rate(), self.layer, name)

    def _rate(self) -> float:
        return self.config.transformer_xl.dropout if self.training else 0.0

    def _drop_plain(self, x: Tensor, batch: BatchInfo, name: str) -> Tensor:
        """Where Transformer-XL's code has dropout and that of the table has none."""
        return x if self.config.transformer_xl.attn_type == "table" else self._drop(x, batch, name)

    def _normed(self, norm: LayerNorm | None, x: Tensor) -> Tensor:
        assert norm is not None  # a sublayer that is there has its norm
        normed: Tensor = norm(x)
        return normed


def _norm(config: ModelConfig, used: bool, spare: bool) -> LayerNorm | None:
    """A norm that is trained where it is `used`; None where it is neither used nor a `spare` one."""
    return LayerNorm(config.hidden_size, config.norm_eps).requires_grad_(used) if used or spare else None


class BiasedHead(Head):
    """Output projection with a bias, which is the weight of a constant input."""

    def __init__(self, size: int, vocab_size: int, std: float, kernels: Backend, tied: bool) -> None:
        super().__init__(size, vocab_size, std, kernels, tied)
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.initial["bias"] = Constant(0.0)

    def forward(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """hidden [B, S, D] -> logits [B, S, V] in hidden's dtype."""
        return super().forward(_with_one(hidden), self._with_bias(weight))

    def loss(self, hidden: Tensor, weight: Tensor | None, targets: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        """As `Head.loss`."""
        return super().loss(_with_one(hidden), self._with_bias(weight), targets, coef)

    def difference(self, one: Tensor, other: Tensor, weight: Tensor | None, coef: Tensor) -> Tensor:
        """As `Head.difference`."""
        return super().difference(_with_one(one), _with_one(other), self._with_bias(weight), coef)

    def _with_bias(self, weight: Tensor | None) -> Tensor:
        return torch.cat([self.weight if weight is None else weight, self.bias[:, None]], 1)


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


@dataclass(frozen=True)
class Memory(Cache):
    """What layers got for at most `most` columns before a batch, without gradients. Rows are not padded."""

    most: int = field(kw_only=True)
    before: Tensor = field(kw_only=True)  # [B] int64 on the CPU: tokens until now of the document in which each row has stopped

    @staticmethod
    def start(rows: int, most: int, device: torch.device | str = "cpu") -> Memory:
        """Nothing yet, for batches of so many `rows`."""
        nothing = torch.zeros(rows, dtype=torch.int64)
        return Memory(nothing.to(device), most=most, before=nothing)

    def go_on(self, positions: Tensor, doc_ids: Tensor, targets: Tensor) -> tuple[Tensor, Memory]:
        """Positions [B, S] that count on where rows go on with a document of the rows before, and the memory with the new `before`.

        All int64 [B, S] on the CPU, as the loader gives them: positions and documents counted from the start of the row, and a last
        target (not -100) where the document goes on after the row.
        """
        positions = positions + (doc_ids == doc_ids[:, :1]) * self.before[:, None]
        before = torch.where(targets[:, -1] >= 0, positions[:, -1] + 1, 0)
        return positions, replace(self, before=before)

    def extend(self, columns: int, layers: dict[str, Past]) -> Memory:
        """With so many more columns, which are in `layers` already, but for those that are too far back."""
        length = min(self.length + columns, self.most)
        return replace(self, length=length, layers={name: _cut(past, length) for name, past in layers.items()})

    def take(self, rows: list[int]) -> Memory:
        """Of these rows alone, in this order."""
        taken = super().take(rows)
        return replace(self, padding=taken.padding, layers=taken.layers, before=self.before[rows])


def _cut(past: Past, length: int) -> Past:
    # Copies, since a slice would keep all columns alive until the next batch.
    seen = None if past.seen is None else tuple(rows.detach()[:, rows.shape[1] - length :].clone() for rows in past.seen)
    return Past(seen, tree_map_only(Tensor, Tensor.detach, past.memory))
