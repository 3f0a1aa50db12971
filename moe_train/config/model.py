"""The model section: what is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from moe_train.config.base import Conflict, Probability, Section
from moe_train.config.blocks import block_conflicts
from moe_train.config.router import RegisteredRouter, RouterConfig, default_router


class TransformerXLSection(Section):
    """The block of the papers' small models (`model.block: transformer_xl`); see moe_train/model/transformer_xl.py."""

    layers: str | None = None
    """two characters for each block: s (self-attention) or . (none), then g (experts), c (experts with an adaptive gate: router acmoe),
    f (dense MLP) or . (none); default: sg for each, or sc where the router is adaptive"""
    attn_type: Literal["table", "relative", "absolute"] = "table"
    """how attention knows positions: table = a learned row for each distance, shared by all blocks (RMoE, ACMoE); relative =
    Transformer-XL's sinusoids of distances; absolute = sinusoids added to the embeddings"""
    attn_span: PositiveInt = 512
    """table: the farthest distance that attention sees"""
    residual: Literal["double", "single"] = "double"
    """double: a norm and a residual inside of those around the experts (RMoE, ACMoE); single: only those around"""
    dropout: Probability = 0.0
    """probability that an entry is dropped in training"""


class ModelConfig(Section):
    """The decoder: Llama-style or as the papers' small models, with a mixture-of-experts layer in place of the MLP."""

    block: Literal["llama", "transformer_xl"] = "llama"
    """llama: pre-norm, RMSNorm, rotary positions, SwiGLU; transformer_xl: post-norm, LayerNorm, positions by distance, ReLU, biases"""
    transformer_xl: TransformerXLSection = TransformerXLSection()
    """keys of block transformer_xl"""
    hidden_size: PositiveInt = 128
    """width D of the residual stream"""
    num_layers: PositiveInt = 4
    """decoder blocks, dense ones included"""
    num_heads: PositiveInt = 4
    """query heads"""
    num_kv_heads: PositiveInt | None = None
    """key and value heads; default num_heads"""
    head_dim: PositiveInt | None = None
    """width of a head; default hidden_size / num_heads"""
    num_experts: PositiveInt = 8
    """experts E of a layer"""
    ffn_hidden_size: PositiveInt = 128
    """width F of one expert"""
    shared_expert_size: NonNegativeInt = 0
    """width of an expert that every token visits; 0 = none"""
    num_dense_layers: NonNegativeInt = 0
    """leading blocks with a dense MLP; router state passes through them untouched"""
    moe_layer_freq: PositiveInt | list[Literal[0, 1]] = 1
    """which of the other blocks have experts: every n-th, from block 0 on (2 is GLaM's placement); or 1 (experts) or 0 (dense MLP)
    for each block"""
    dense_ffn_hidden_size: PositiveInt | None = None
    """width of a dense MLP; default top_k * ffn_hidden_size"""
    vocab_size: PositiveInt | None = None
    """rows of the embedding; default the tokenizer's vocabulary, rounded up to a multiple of 64"""
    tie_embeddings: bool = False
    """the output projection is the embedding"""
    num_classes: PositiveInt | None = None
    """width of a classifier's head, which takes the place of the output projection (sft.task=classification sets it); null = a
    language model"""
    qk_norm: bool | Literal["width"] = False
    """RMSNorm on queries and keys: true = each head by itself; width = all heads together (OLMoE)"""
    rope_theta: PositiveFloat = 10000.0
    """base of the rotary position embedding"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of norms"""
    init_std: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    frozen_experts: bool = False
    """the experts are not trained (fine-tuning a new router)"""
    capacity_factor: PositiveFloat | None = None
    """an expert takes at most this times the mean load of a row; choices beyond it are dropped; null = dropless"""
    drop_policy: Literal["position", "score"] = "position"
    """which choices an expert over its capacity drops: position = the latest in the row; score = the lowest scores, which is not
    causal (a later token can push out an earlier one)"""
    router: Annotated[RouterConfig, RegisteredRouter] = Field(default_factory=default_router)
    """the router: its name and its own keys"""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def tied_head(self) -> bool:
        """Whether the head has no weight of its own."""
        return self.tie_embeddings and self.num_classes is None

    @property
    def dense_size(self) -> int:
        """Width of a dense MLP."""
        return self.dense_ffn_hidden_size or self.router.top_k * self.ffn_hidden_size

    @property
    def sublayers(self) -> list[str]:
        """The two characters of each block (transformer_xl)."""
        text = self.transformer_xl.layers
        return ["sg"] * self.num_layers if text is None else [text[i : i + 2] for i in range(0, len(text), 2)]

    @property
    def moe_layers(self) -> Sequence[int]:
        """Numbers of the blocks with experts; the others have a dense MLP (Megatron-LM's rule for moe_layer_freq)."""
        if self.block == "transformer_xl":
            return [layer for layer, pair in enumerate(self.sublayers) if pair[1:] in ("g", "c")]
        freq, first = self.moe_layer_freq, self.num_dense_layers
        if isinstance(freq, int):
            return range(-(-first // freq) * freq, self.num_layers, freq)
        return [layer for layer, experts in enumerate(freq[: self.num_layers]) if experts and layer >= first]

    @property
    def has_dense_layers(self) -> bool:
        """Whether a block has a dense MLP."""
        freq = self.moe_layer_freq
        return self.num_dense_layers > 0 or (freq > 1 if isinstance(freq, int) else 0 in freq)

    def leaks(self) -> list[str]:
        """What a token sees that a causal model must not, one line each."""
        found = self.router.leaks()
        if self.capacity_factor is not None and self.drop_policy == "score":
            found.append(
                "model.drop_policy=score: whether an expert takes a token depends on the scores of later tokens of its row"
            )
        return found

    def conflicts(self) -> list[Conflict]:
        """Rules between the model's keys."""
        found = block_conflicts(self)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rule = f"must divide model.hidden_size={self.hidden_size}"
            found.append(Conflict("model.num_heads", self.num_heads, rule, "change it or set model.head_dim"))
        elif self.head_size % 2 and self.block == "llama":
            found.append(Conflict("model.head_dim", self.head_size, "must be even for rotary embeddings", "use an even width"))
        if self.num_heads % self.kv_heads:
            rule = f"must divide model.num_heads={self.num_heads}"
            found.append(Conflict("model.num_kv_heads", self.kv_heads, rule, "use a divisor"))
        return found + self.router.conflicts(self)
