"""A decoder whose blocks, Llama-style or `transformer_xl`, hand a small row of router state from layer to layer beside each hidden row.

Shapes: B rows, S positions, D hidden, R router state, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.attention import Attention, Rotary
from moe_train.model.cache import Cache, Past
from moe_train.model.layers import Embedding, Head, RMSNorm, SwiGLU, rotary_tables
from moe_train.model.moe import LayerStats, MoE, run_directly
from moe_train.model.relative_attention import Places, Positions
from moe_train.model.routing import BatchInfo, Carry, router_class
from moe_train.model.transformer_xl import BiasedHead, TransformerXLBlock


class Output(NamedTuple):
    """What a decoder, or the layers of one pipeline stage, return."""

    carry: Carry  # after the last block here
    stats: dict[str, LayerStats]  # by layer name
    logits: Tensor | None = None  # [B, S, V], only where there is a head and no targets were given; while decoding [B, 1, V]
    loss: Tensor | None = None  # [] fp32 with gradient: cross entropy / target count + weighted router losses / token count
    token_loss: Tensor | None = None  # [B, S_local] fp32, detached, nats; 0 where there is no target
    cache: Cache | None = None  # while decoding: the one that was given, with these tokens


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

    def forward(
        self, carry: Carry, batch: BatchInfo, rotary: Rotary, shared: nn.Module | None, past: Past | None = None
    ) -> tuple[Carry, LayerStats, Past | None]:
        """One layer: a new carry, the layer's statistics and, while decoding, `past` with these tokens."""
        hidden, normed, past = self.run_attention(self._attend, carry.hidden, batch, rotary, past)
        if isinstance(self.mlp, SwiGLU):
            return carry._replace(hidden=hidden + self.run_mlp(self.mlp, normed)), {}, past
        memory = None if past is None else past.memory
        out, carry, stats, memory = self.mlp(normed, carry, batch, shared, self.run_mlp, memory)
        past = None if past is None else past._replace(memory=memory)
        return carry._replace(hidden=hidden + out), stats, past

    def _attend(
        self, hidden: Tensor, batch: BatchInfo, rotary: Rotary, past: Past | None = None
    ) -> tuple[Tensor, Tensor, Past | None]:
        """The residual stream after attention, its norm, and `past` with the keys and values of these tokens."""
        normed = self.attention_norm(hidden)
        past = None if past is None else past.extend(self.attention.keys_values(normed, rotary))
        attended = self.attention(normed, batch, rotary, None if past is None else past.seen)
        return *self.mlp_norm.after_add(hidden, attended), past


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head; a pipeline stage has some of them. Forward changes nothing."""

    embedding: Embedding | None
    norm: nn.Module | None
    head: Head | None

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; it comes from the tokenizer before a model is built")
        self.config = config
        router = router_class(config.router)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        llama = config.block == "llama"
        block: type[Block | TransformerXLBlock] = Block if llama else TransformerXLBlock
        self.positions = None if llama else Positions(config)
        self.layers = nn.ModuleDict({str(i): block(config, i, kernels) for i in range(config.num_layers)})
        self.shared_router = router.make_shared(config.router, config, kernels)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, kernels) if llama else nn.Identity()
        head = Head if llama else BiasedHead
        self.head = head(
            config.hidden_size, config.num_classes or config.vocab_size, config.init_std, kernels, config.tied_head
        )
        self.state_size = router.state_size_of(config.router, config)

    def forward(
        self, batch: BatchInfo, targets: Tensor | None = None, carry: Carry | None = None, cache: Cache | None = None
    ) -> Output:
        """Logits of a batch; or, with targets [B, S] (-100 where there is none), its share of the step's loss.

        A pipeline stage that lacks the embedding takes the `carry` of the stage before; one that lacks the head returns it.
        With a `cache`, batch is what `cache.batch` gave for the tokens after it (or, with a `Memory`, rows whose positions go on), and
        logits are those of the last column.
        """
        if targets is not None and self.training and router_class(self.config.router).two_passes:
            return self._agree(batch, targets, cache)
        carry, stats, cache = self.run_layers(self.start(batch) if carry is None else carry, batch, cache)
        if self.norm is None:
            return Output(carry, stats)
        if cache is not None and targets is None:
            carry = carry._replace(hidden=carry.hidden[:, -1:])
        return self.finish(carry, stats, batch, targets)._replace(cache=cache)

    def start(self, batch: BatchInfo) -> Carry:
        """What the first block gets: embedded tokens, no router state, no loss."""
        assert self.embedding is not None
        hidden = self.embedding(batch.context(batch.tokens))
        if self.positions is not None:
            hidden = self.positions.embed(hidden, batch)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        state = hidden.new_zeros(*hidden.shape[:2], self.state_size, dtype=wide)
        return Carry(hidden, state, hidden.new_zeros(1, dtype=wide))

    def run_layers(
        self, carry: Carry, batch: BatchInfo, cache: Cache | None = None
    ) -> tuple[Carry, dict[str, LayerStats], Cache | None]:
        """The blocks that are here, their statistics by layer name, and the cache with these tokens."""
        places = self._places(batch, 0 if cache is None else cache.length)
        stats, layers = {}, {}
        for name, block in self.layers.items():
            past = None if cache is None else cache.layers.get(name, Past())
            carry, layer_stats, layers[name] = block(carry, batch, places, self.shared_router, past)
            if layer_stats:
                stats[name] = layer_stats
        return carry, stats, None if cache is None else cache.extend(batch.tokens.shape[1], layers)

    def _places(self, batch: BatchInfo, kept: int) -> Rotary | Places:
        """What attention knows of the positions of a batch that comes after `kept` columns."""
        if self.positions is not None:
            places: Places = self.positions(batch, kept)
            return places
        return rotary_tables(batch.context(batch.positions), self.config.head_size, self.config.rope_theta)

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

    def _agree(self, batch: BatchInfo, targets: Tensor, cache: Cache | None) -> Output:
        """The loss of two passes over each row, with random numbers of their own, and of the difference of their predictions.

        Both see the `cache`; the one that is returned is that of the first pass.
        """
        assert self.norm is not None
        assert self.head is not None
        both, rows = batch.twice(), list(range(len(targets)))
        carry, stats, cache = self.run_layers(self.start(both), both, None if cache is None else cache.take(rows + rows))
        output = self.finish(carry, stats, both, targets.repeat(2, 1))
        assert output.loss is not None
        assert output.token_loss is not None
        coef = (targets >= 0).to(carry.loss.dtype) / batch.target_count
        one, other = self.norm(carry.hidden).chunk(2)
        difference = self.head.difference(one, other, self._tied_weight(), coef)
        loss = output.loss + self.config.router.loss_weights()["consistency"] * difference
        cache = None if cache is None else cache.take(rows)
        return output._replace(loss=loss, token_loss=torch.stack(output.token_loss.chunk(2)).mean(0), cache=cache)

    def _tied_weight(self) -> Tensor | None:
        return self.embedding.weight if self.config.tied_head and self.embedding is not None else None
