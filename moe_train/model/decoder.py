"""A Llama-style decoder whose blocks hand a small row of router state from layer to layer beside each hidden row.

Shapes: B rows, S positions, D hidden, R router state, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.attention import Attention, Rotary
from moe_train.model.capacity import drop_over_capacity
from moe_train.model.layers import Embedding, Head, RMSNorm, SwiGLU, rotary_tables
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Carry, router_class

LayerStats = dict[str, Tensor]  # detached local sums of one layer; empty for a dense one


class Output(NamedTuple):
    """What a decoder, or the layers of one pipeline stage, return."""

    carry: Carry  # after the last block here
    stats: dict[str, LayerStats]  # by layer name
    logits: Tensor | None = None  # [B, S, V], only where there is a head and no targets were given
    loss: Tensor | None = None  # [] fp32 with gradient: cross entropy / target count + weighted router losses / token count
    token_loss: Tensor | None = None  # [B, S_local] fp32, detached, nats; 0 where there is no target


def run_directly(part: Callable[..., Any], *args: Any) -> Any:
    """How a block runs its parts where nothing is recomputed."""
    return part(*args)


class Block(nn.Module):
    """Attention, then experts (or a dense MLP), each on normed rows and added to the residual stream.

    `run_attention` and `run_mlp` call the two costly parts; recomputation replaces them from outside. The router is in neither.
    """

    run_attention: Callable[..., Any]
    run_mlp: Callable[..., Any]

    def __init__(self, config: ModelConfig, layer: int, kernels: Backend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.attention = Attention(config, kernels)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.mlp: MoE | SwiGLU
        if layer in config.moe_layers:
            self.mlp = MoE(config, layer, kernels)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.dense_size, config.init_std, kernels)
        self.run_attention = self.run_mlp = run_directly
        self.config = config

    def forward(self, carry: Carry, batch: BatchInfo, rotary: Rotary, shared: nn.Module | None) -> tuple[Carry, LayerStats]:
        """One layer: a new carry and the layer's statistics."""
        hidden, normed = self.run_attention(self._attend, carry.hidden, batch, rotary)
        if isinstance(self.mlp, SwiGLU):
            return carry._replace(hidden=hidden + self.run_mlp(self.mlp, normed)), {}
        routing = self.mlp.router(normed, carry.state, batch, shared)
        if self.config.capacity_factor is not None:
            routing = drop_over_capacity(routing, batch, self.config)
        out = self.run_mlp(self.mlp.mix, normed, routing, self.mlp.plan(routing))
        weights = self.mlp.router.config.loss_weights()
        loss = carry.loss
        for name, value in routing.losses.items():
            loss = loss + (weights[name] / batch.token_count) * value
        losses = {f"{name}_loss": value.detach() for name, value in routing.losses.items()}
        return Carry(hidden + out, routing.state, loss), routing.stats | losses

    def _attend(self, hidden: Tensor, batch: BatchInfo, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm."""
        attended = self.attention(self.attention_norm(hidden), batch, rotary)
        return self.mlp_norm.after_add(hidden, attended)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; a pipeline stage has some of them. Forward changes nothing."""

    embedding: Embedding | None
    norm: RMSNorm | None
    head: Head | None

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; it comes from the tokenizer before a model is built")
        self.config = config
        router = router_class(config.router)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleDict({str(i): Block(config, i, kernels) for i in range(config.num_layers)})
        self.shared_router = router.make_shared(config.router, config, kernels)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.head = Head(config.hidden_size, config.vocab_size, config.init_std, kernels, config.tie_embeddings)
        self.state_size = router.state_size_of(config.router, config)

    def forward(self, batch: BatchInfo, targets: Tensor | None = None, carry: Carry | None = None) -> Output:
        """Logits of a batch; or, with targets [B, S] (-100 where there is none), its share of the step's loss.

        A pipeline stage that lacks the embedding takes the `carry` of the stage before; one that lacks the head returns it.
        """
        if targets is not None and self.training and router_class(self.config.router).two_passes:
            return self._agree(batch, targets)
        carry, stats = self.run_layers(self.start(batch) if carry is None else carry, batch)
        return self.finish(carry, stats, batch, targets) if self.norm is not None else Output(carry, stats)

    def start(self, batch: BatchInfo) -> Carry:
        """What the first block gets: embedded tokens, no router state, no loss."""
        assert self.embedding is not None
        hidden = self.embedding(batch.context(batch.tokens))
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        state = hidden.new_zeros(*hidden.shape[:2], self.state_size, dtype=wide)
        return Carry(hidden, state, hidden.new_zeros(1, dtype=wide))

    def run_layers(self, carry: Carry, batch: BatchInfo) -> tuple[Carry, dict[str, LayerStats]]:
        """The blocks that are here, and their statistics by layer name."""
        rotary = rotary_tables(batch.context(batch.positions), self.config.head_size, self.config.rope_theta)
        stats = {}
        for name, block in self.layers.items():
            carry, layer_stats = block(carry, batch, rotary, self.shared_router)
            if layer_stats:
                stats[name] = layer_stats
        return carry, stats

    def finish(self, carry: Carry, stats: dict[str, LayerStats], batch: BatchInfo, targets: Tensor | None) -> Output:
        """Norm, head, and the sum of all losses."""
        assert self.norm is not None
        assert self.head is not None
        hidden = self.norm(carry.hidden)
        weight = self._tied_weight()
        if targets is None:
            return Output(carry, stats, logits=self.head(hidden, weight))
        targets = batch.context(targets)
        coef = (targets >= 0).to(carry.loss.dtype) / batch.target_count
        loss, token_loss = self.head.loss(hidden, weight, targets, coef)
        loss = loss + carry.loss.sum()
        router = self.config.router
        weights = router.loss_weights()
        for name, value in router_class(router).readout(router, carry.state, token_loss).items():
            loss = loss + (weights[name] / batch.token_count) * value
        return Output(carry, stats, loss=loss, token_loss=token_loss)

    def _agree(self, batch: BatchInfo, targets: Tensor) -> Output:
        """The loss of two passes over each row, with random numbers of their own, and of the difference of their predictions."""
        assert self.norm is not None
        assert self.head is not None
        both = batch.twice()
        carry, stats = self.run_layers(self.start(both), both)
        output = self.finish(carry, stats, both, targets.repeat(2, 1))
        assert output.loss is not None
        assert output.token_loss is not None
        coef = (targets >= 0).to(carry.loss.dtype) / batch.target_count
        one, other = self.norm(carry.hidden).chunk(2)
        difference = self.head.difference(one, other, self._tied_weight(), coef)
        loss = output.loss + self.config.router.loss_weights()["consistency"] * difference
        return output._replace(loss=loss, token_loss=torch.stack(output.token_loss.chunk(2)).mean(0))

    def _tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.config.tie_embeddings and self.embedding is not None else None
