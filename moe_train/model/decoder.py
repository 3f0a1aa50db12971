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
from moe_train.model.layers import Embedding, Head, RMSNorm, SwiGLU, rotary_tables
from moe_train.model.moe import MoE
from moe_train.model.routing import BatchInfo, Carry, router_class

LayerStats = dict[str, Tensor]  # detached local sums of one layer; empty for a dense one


class Output(NamedTuple):
    """What a decoder returns."""

    logits: Tensor | None  # [B, S, V], only where no targets were given
    loss: Tensor | None  # [] fp32 with gradient: cross entropy / target count + weighted router losses / token count
    token_loss: Tensor | None  # [B, S] fp32, detached, nats; 0 where there is no target
    stats: dict[str, LayerStats]  # by layer name


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
        if layer < config.num_dense_layers:
            self.mlp = SwiGLU(config.hidden_size, config.dense_size, config.init_std, kernels)
        else:
            self.mlp = MoE(config, layer, kernels)
        self.run_attention = self.run_mlp = run_directly

    def forward(self, carry: Carry, batch: BatchInfo, rotary: Rotary, shared: nn.Module | None) -> tuple[Carry, LayerStats]:
        """One layer: a new carry and the layer's statistics."""
        hidden, normed = self.run_attention(self._attend, carry.hidden, batch, rotary)
        if isinstance(self.mlp, SwiGLU):
            return carry._replace(hidden=hidden + self.run_mlp(self.mlp, normed)), {}
        routing = self.mlp.router(normed, carry.state, batch, shared)
        out = self.run_mlp(self.mlp.mix, normed, routing.expert_ids, routing.weights)
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
    """Embedding, blocks, final norm and head. Forward changes nothing."""

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
        self.state_size = router.state_size_of(config.router)

    def forward(self, batch: BatchInfo, targets: Tensor | None = None) -> Output:
        """Logits of a batch; or, with targets [B, S] (-100 where there is none), its share of the step's loss."""
        config = self.config
        rotary = rotary_tables(batch.positions, config.head_size, config.rope_theta)
        carry, stats = self._start(self.embedding(batch.tokens)), {}
        for name, block in self.layers.items():
            carry, layer_stats = block(carry, batch, rotary, self.shared_router)
            if layer_stats:
                stats[name] = layer_stats
        hidden = self.norm(carry.hidden)
        weight = self.embedding.weight if config.tie_embeddings else None
        if targets is None:
            return Output(self.head(hidden, weight), None, None, stats)
        coef = (targets >= 0).to(carry.loss.dtype) / batch.target_count
        loss, token_loss = self.head.loss(hidden, weight, targets, coef)
        return Output(None, loss + carry.loss.sum(), token_loss, stats)

    def _start(self, hidden: Tensor) -> Carry:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        state = hidden.new_zeros(*hidden.shape[:2], self.state_size, dtype=wide)
        return Carry(hidden, state, hidden.new_zeros(1, dtype=wide))
