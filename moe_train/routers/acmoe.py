"""ACMoE: the adaptive clustering router (arXiv 2502.15315).

A token's cluster is the expert that the MoE layer before chose first for it. Features in which its cluster is tight are magnified
before the token is compared with the experts, so that tokens of one cluster, and small changes of a token, route alike. Nothing of it
is learned. In the paper's terms M_c = diag(1 / D_1c, ..., 1 / D_Dc) and s_e = x' M_c(x) v_e; the recipe is that of the released
language models (github.com/Fsoft-AIC/Tight-Clusters-Make-Specialized-Experts, `use_var` with `mad`):

    D_qc = mean over the tokens of cluster c of |x_q - mean_qc|         feature q; `dispersion: mad`
    W_qc = min(1 / (D_qc + 1e-4), 10 times the mean of all of them),    then divided by its mean over clusters, feature by feature
    s_e  = (x * W_c) . v_e / |v_e|                                      v: [E, D]; then top-k as in topk.py

W is a constant: gradients reach x and v. Other dispersions, as the released code has them, are neither clipped nor divided by a mean:
`variance`, 1 / (var + 0.1), and `pairwise`, 1 / (mean |x_q - y_q| over the pairs of the cluster + 1e-4). `mix_weights` takes the
mean of the W of all top_k experts of the layer before, by their routing weights. With `skip_connect` a > 0 the statistics are of
(1 - a) x + a x', x' being the row that the MoE layer before got (the code's option: 0.25); what is scored stays x * W_c. `scoring:
linear` is a linear gate with a bias, as the code's `smoe_base`: s = (x * W_c) C + b. Experts get the row as it is.

Causal by default: M is a running mean of earlier steps' statistics, which are the same for every row and at decoding. Deviations are
taken around the mean that is kept, so that one pass over the tokens is enough; a cluster takes part after its second step with two
tokens or more, and W is 1 until then. `causal: false` is the published form, statistics of the micro-batch itself: a token's routing
then depends on later tokens and on other rows.

State: the expert that was chosen first, plus 1 (0 = none yet), in one column; with `mix_weights` all top_k of them and their weights;
with `skip_connect` the row too, D columns. It has no gradient. Buffers of an adaptive layer: means and dispersions [E, D], updates [E].
Cost per token of an adaptive layer: a linear gate's 2 D E FLOP, D for the scaling, and 4 D E + 3 D for the statistics, forward only
(where causal, in training only).

Traps: with an empty cluster or one of a single token the published code divides by 1e-4, which flattens the scores of all others about
300 times; here such clusters have W = 1 and are in no mean. It also takes an arbitrary one of the top_k as the label, and counts
clusters up to the highest label in the batch. Its balance loss is never switched on. It rescales v to length 1.5 in each forward pass,
which changes no score; here the length of v drifts, and with it the step of its direction. Its option `temp_disp` (dispersion of what
experts give from layer to layer) is not here: the code computes weights from it and then overwrites them. `causal: false` depends on
the layout's micro_batch_size, and at decoding a lone token has no cluster.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import Conflict, ModelConfig, Probability
from moe_train.model.init import Constant, Normal, Orthogonal
from moe_train.model.routing import BatchInfo, Routing, register
from moe_train.routers.topk import SMALLEST_SUM, TokenChoice, TokenChoiceConfig, with_bias

OFFSETS = {"mad": 1e-4, "variance": 0.1, "pairwise": 1e-4}  # what keeps 1 / dispersion finite
CLIP = 10.0  # largest weight, as a multiple of the mean weight
GAIN = 0.32  # of the experts' embeddings

Sums = dict[str, Tensor]


class ACMoEConfig(TokenChoiceConfig):
    """ACMoE's keys."""

    name: Literal["acmoe"] = "acmoe"
    """ACMoE: features in which a token's cluster is tight count more"""
    causal: bool = True
    """true: the clusters' statistics come from earlier steps; false: from the micro-batch itself, as published, which is not causal"""
    plain_layers: PositiveInt = 1
    """leading MoE layers that route by the plain row; the first has no clusters (the paper's language models: 2)"""
    dispersion: Literal["mad", "variance", "pairwise"] = "mad"
    """how a cluster's spread is measured: mean absolute deviation, variance, or mean difference of pairs"""
    mix_weights: bool = False
    """mean over the clusters of all top_k experts of the layer before, instead of the first one's alone"""
    scoring: Literal["direction", "linear"] = "direction"
    """how scaled rows are compared with experts: by the directions of embeddings, or by a linear gate with a bias"""
    skip_connect: Probability = 0.0
    """share of the row that the MoE layer before got in the row whose statistics are taken (the released code's option: 0.25)"""
    momentum: Probability = 0.9
    """share of the kept statistics that a step leaves as it is"""

    def conflicts(self, model: ModelConfig) -> list[Conflict]:
        """One layer at least is adaptive."""
        found = super().conflicts(model)
        if not self.adaptive_layers(model):
            rule = "must be below the number of MoE layers, so that one of them is adaptive"
            found.append(Conflict("model.router.plain_layers", self.plain_layers, rule, "lower it or add layers"))
        return found

    def adaptive_layers(self, model: ModelConfig) -> Sequence[int]:
        """The MoE layers after the plain ones."""
        return model.moe_layers[self.plain_layers :]

    def leaks(self) -> list[str]:
        """The published form reads the whole micro-batch."""
        if self.causal:
            return []
        return [
            "model.router.causal=false: the statistics of acmoe's clusters are taken over the micro-batch, so a token's routing "
            "depends on later tokens of its row and on other rows"
        ]


@register(ACMoEConfig)
class ACMoERouter(TokenChoice):
    """One layer of ACMoE; see the module's docstring."""

    config: ACMoEConfig
    state_grad = False
    means: Tensor
    dispersions: Tensor
    updates: Tensor

    def __init__(self, config: ACMoEConfig, model: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__(config, model, layer, kernels)
        shape = model.num_experts, model.hidden_size
        linear = config.scoring == "linear"
        self.embedding = nn.Parameter(torch.empty(shape))
        self.initial["embedding"] = Normal(model.init_std) if linear else Orthogonal(GAIN)
        self.bias = nn.Parameter(torch.empty(shape[0])) if linear else None
        self.initial["bias"] = Constant(0.0)
        self.adaptive = layer in config.adaptive_layers(model)
        self.least = 1 if config.dispersion == "pairwise" else 2  # pairs or tokens that a cluster needs
        if self.adaptive and config.causal:
            self.register_buffer("means", torch.empty(shape))
            self.register_buffer("dispersions", torch.empty(shape))
            self.register_buffer("updates", torch.empty(shape[0]))
            self.initial |= dict.fromkeys(("means", "dispersions", "updates"), Constant(0.0))

    @staticmethod
    def state_size_of(config: ACMoEConfig, model: ModelConfig) -> int:
        """Columns of router state per token."""
        return _label_columns(config) + (model.hidden_size if config.skip_connect else 0)

    def forward(self, x: Tensor, state: Tensor, batch: BatchInfo, shared: nn.Module | None, memory: object = None) -> Routing:
        """x [B, S_local, D], state [B, S_local, R] -> Routing with this layer's choice as the next state."""
        stats: Sums = {}
        scored, wide = x, x.to(state.dtype)
        labels, before = state.tensor_split((_label_columns(self.config),), -1)
        if self.adaptive:
            measured = wide.lerp(before, self.config.skip_connect) if self.config.skip_connect else wide
            weights, stats = self._adapt(measured, labels, batch)
            scored = x * weights.to(x.dtype)
        rows, weight = scored, F.normalize(self.embedding, dim=-1)
        if self.bias is not None:
            rows, weight = with_bias(scored, self.embedding, self.bias)
        routing = self.choose(rows, weight, state, batch)
        labels = self._labels(routing, labels)
        state = torch.cat([labels, wide.detach()], -1) if self.config.skip_connect else labels
        return routing._replace(state=state, stats=routing.stats | stats)

    @torch.no_grad()
    def after_step(self, stats: Sums, progress: float) -> None:
        """Move the kept statistics towards the step's; a cluster's first ones are copied."""
        super().after_step(stats, progress)
        if "cluster_counts" not in stats:
            return
        counts = stats["cluster_counts"].to(self.updates)
        live = counts >= self.least
        counts = counts.clamp_min(1)[:, None]
        # The first step's deviations are around no mean yet: the second's are copied over them.
        self._blend(self.dispersions, stats["cluster_deviations"].to(counts) / counts, live, self.updates <= 1)
        if "cluster_sums" in stats:
            self._blend(self.means, stats["cluster_sums"].to(counts) / counts, live, self.updates < 1)
        self.updates += live

    def _blend(self, kept: Tensor, new: Tensor, live: Tensor, copy: Tensor) -> None:
        rate = torch.where(copy, 1.0, 1.0 - self.config.momentum).to(kept) * live
        kept.lerp_(new, rate[:, None])

    @torch.no_grad()
    def _adapt(self, x: Tensor, labels: Tensor, batch: BatchInfo) -> tuple[Tensor, Sums]:
        """The weight of each feature of each token, like x [B, S_local, D], and what `after_step` needs; `labels`: see `_labels`."""
        kept = self.config.causal
        sums = self._measure(x, labels[..., 0].long(), batch) if self.training or not kept else {}
        if kept:
            dispersions, live = self.dispersions, self.updates >= 2
        else:
            counts = sums["cluster_counts"]
            dispersions, live = sums["cluster_deviations"] / counts.clamp_min(1)[:, None], counts >= self.least
        table = feature_weights(dispersions, live, self.config.dispersion)
        table = torch.cat([torch.ones_like(table[:1]), table])  # label 0: no cluster
        return self._look_up(table, labels), sums if kept else {}

    def _look_up(self, table: Tensor, labels: Tensor) -> Tensor:
        """table [E + 1, D] at the labels that `_labels` gave -> [B, S_local, D]."""
        if not self.config.mix_weights:
            return table[labels[..., 0].long()]
        labels, shares = labels.chunk(2, -1)
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
        columns = zip(labels.long().unbind(-1), shares.unbind(-1), strict=True)
        return torch.stack([table[label] * share[..., None] for label, share in columns]).sum(0)

    def _measure(self, x: Tensor, labels: Tensor, batch: BatchInfo) -> Sums:
        """Sums over the tokens x [B, S_local, D] of each cluster, labels [B, S_local] from 1.

        They are over this rank's tokens, except for pairs and for the published form, which need all tokens of the micro-batch.
        """
        experts = len(self.embedding)
        if self.config.dispersion == "pairwise":
            return pair_differences(batch.whole(x).flatten(0, 1), batch.whole(labels).flatten(), experts)
        x, labels = x.flatten(0, 1), labels.flatten()
        members = (labels[:, None] == torch.arange(1, experts + 1, device=labels.device)).to(x.dtype)
        counts, sums = members.sum(0), members.t() @ x  # products and not scatters: the same sum whenever it is repeated
        if self.config.causal:
            centers = self.means
        else:
            counts, sums = batch.sum(counts), batch.sum(sums)
            centers = sums / counts.clamp_min(1)[:, None]
        deviations = x - centers[(labels - 1).clamp_min(0)]
        deviations = members.t() @ (deviations.abs() if self.config.dispersion == "mad" else deviations.square())
        if not self.config.causal:
            deviations = batch.sum(deviations)
        return {"cluster_counts": counts, "cluster_sums": sums, "cluster_deviations": deviations}

    def _labels(self, routing: Routing, like: Tensor) -> Tensor:
        """What the next layer needs to know of this layer's choice, like `like` [B, S_local, 1 or 2 K]."""
        if not self.config.mix_weights:
            return (routing.expert_ids[:, :1] + 1).to(like.dtype).view_as(like)
        labels = (routing.expert_ids + 1).to(like.dtype)
        return torch.cat([labels, routing.weights.detach().to(like.dtype)], -1).view_as(like)


def _label_columns(config: ACMoEConfig) -> int:
    return 2 * config.top_k if config.mix_weights else 1


def feature_weights(dispersions: Tensor, live: Tensor, kind: str) -> Tensor:
    """How much each feature counts in each cluster, [E, D], from dispersions [E, D]; 1 in a cluster that is not `live` [E]."""
    live = live[:, None]
    weights = live / (dispersions + OFFSETS[kind])
    if kind == "mad":
        number = live.sum().clamp_min(1)
        weights = weights.minimum(CLIP * weights.mean(1).sum() / number)
        weights = weights / (weights.sum(0) / number)
    return torch.where(live, weights, 1.0)


def pair_differences(x: Tensor, labels: Tensor, experts: int) -> Sums:
    """Pairs of tokens of each cluster, [E], and the sums of their |x - y|, [E, D], from x [T, D] and labels [T] from 1.

    Sorted, the r-th of n values (from 0) is the larger one in r pairs and the smaller one in n - 1 - r. Every rank that shares the
    rows counts the same pairs, which cancels in their mean.
    """
    counts = (labels[:, None] == torch.arange(experts + 1, device=labels.device)).sum(0)
    values, order = x.sort(dim=0)
    values = values.gather(0, labels[order].argsort(dim=0, stable=True))  # by cluster, then by value, feature by feature
    cluster = labels.sort().values
    rank = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[cluster]
    times = (2 * rank + 1 - counts[cluster]).to(x.dtype)
    members = (cluster[:, None] == torch.arange(1, experts + 1, device=labels.device)).to(x.dtype)
    pairs = (counts * (counts - 1) // 2)[1:].to(x.dtype)
    return {"cluster_counts": pairs, "cluster_deviations": members.t() @ (times[:, None] * values)}
