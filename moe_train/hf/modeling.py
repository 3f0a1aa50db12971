"""A decoder of moe_train as transformers knows models.

`moe_train.hf.flatten` joins this file, the decoder and one router into the modeling file of an exported folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from moe_kernels.backend import Backend
from moe_kernels.cross_entropy.reference import linear_cross_entropy
from moe_kernels.grouped_mm.reference import grouped_mm
from moe_kernels.gru.reference import gru_step
from moe_kernels.moe_mlp.reference import moe_mlp
from moe_kernels.permutation.reference import permute, sort_by_expert, unpermute
from moe_kernels.rms_norm.reference import add_rms_norm, rms_norm
from moe_kernels.rope.reference import rope
from moe_kernels.swiglu.reference import swiglu
from moe_kernels.topk.reference import score_topk
from moe_train.config import ModelConfig, RouterConfig
from moe_train.model.attention import find_segments
from moe_train.model.cache import Cache
from moe_train.model.decoder import Decoder
from moe_train.model.init import draw
from moe_train.model.routing import BatchInfo

KERNELS = Backend(
    name="reference",
    sort_by_expert=sort_by_expert,
    permute=permute,
    unpermute=unpermute,
    grouped_mm=grouped_mm,
    moe_mlp=moe_mlp,
    score_topk=score_topk,
    gru_step=gru_step,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    swiglu=swiglu,
    linear_cross_entropy=linear_cross_entropy,
)


class MoETrainConfig(PreTrainedConfig):
    """`model`: the section of that name of the run that trained it."""

    model_type = "moe_train"

    def __init__(self, model: dict[str, Any] | None = None, max_position_embeddings: int = 2048, **rest: Any) -> None:
        self.model = model or {}
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**rest)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model["hidden_size"]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.model["num_layers"]

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.model["num_heads"]

    def settings(self) -> ModelConfig:
        """What the decoder is made from."""
        router = self.model["router"]
        kind = RouterConfig.registry[router["name"]]
        return ModelConfig(**{**self.model, "router": kind(**router)})


class DecodingCache:
    """What decoding keeps of the tokens before, as `generate` hands it on. A forward pass returns a new one and leaves it as it is."""

    is_compileable = is_croppable = False  # transformers asks its own caches

    def __init__(self, kept: Cache) -> None:
        self.kept = kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are kept, padding included; the same in all layers."""
        return self.kept.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order (beam search)."""
        self.kept = self.kept.take(beam_idx.tolist())


class MoETrainForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with the interface of a causal language model. Routers stay in fp32 when the rest is cast to 16 bits."""

    config_class = MoETrainConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["router", "shared_router"]
    _supports_sdpa = True
    _is_stateful = True  # a cache cannot be cut: routers keep sums over tokens

    def __init__(self, config: MoETrainConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.settings(), KERNELS)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        assert self.decoder.embedding is not None
        return self.decoder.embedding

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DecodingCache | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """The tokens that a cache does not hold yet; without one the whole text for each new token."""
        if past_key_values is not None:
            total = (input_ids if attention_mask is None else attention_mask).shape[1]
            input_ids = input_ids[:, past_key_values.get_seq_length() - total :]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        return inputs | {"use_cache": use_cache, "logits_to_keep": 1}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give what a checkpoint does not hold its initial value, from torch's generator."""
        for name, initial in getattr(module, "initial", {}).items():
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and not getattr(tensor, "_is_hf_initialized", False):
                seed = int(torch.randint(2**31, ()))
                tensor.copy_(draw(name, initial, tensor.shape, seed))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: DecodingCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, S] -> logits [B, S, V]; with labels [B, S] (-100 where there is none) the training loss instead.

        `attention_mask` [B, S] is 0 at padding. The loss is the cross entropy per target plus the router's weighted losses, as in
        training; `num_items_in_batch` are the targets that it is divided by. `logits_to_keep`: logits of so many last tokens alone.
        With `use_cache` the result has `past_key_values`, which holds these tokens for the ones that follow them. With it given,
        input_ids are those that follow, and the mask, if there is one, has the columns of both; padding is before the text.
        `return_dict` changes nothing. Raises ValueError for a cache of another model, for labels with a cache, and for a mask that does
        not fit.
        """
        if labels is None:
            return self._predict(input_ids, attention_mask, past_key_values, bool(use_cache), logits_to_keep)
        if past_key_values is not None:
            raise ValueError("past_key_values: cannot be given with labels; leave one of them out")
        batch = self._batch(input_ids, attention_mask)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        own = int((targets >= 0).sum())
        counts = {"target_count": max(int(num_items_in_batch or own), 1), "token_count": batch.tokens.numel()}
        return CausalLMOutputWithPast(loss=self.decoder(BatchInfo(**{**vars(batch), **counts}), targets).loss)

    def _predict(
        self, tokens: Tensor, mask: Tensor | None, past: DecodingCache | None, use_cache: bool, last: int
    ) -> CausalLMOutputWithPast:
        """Logits of tokens that follow `past`, and a cache with them where it is wanted."""
        cache = self._cache(tokens, mask, past) if use_cache or past is not None else None
        batch = self._batch(tokens, mask) if cache is None else cache.batch(tokens, self.dtype)
        carry, stats, cache = self.decoder.run_layers(self.decoder.start(batch), batch, cache)
        carry = carry._replace(hidden=carry.hidden[:, -last:])
        logits = self.decoder.finish(carry, stats, batch, None).logits
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if cache is None else DecodingCache(cache))

    def _cache(self, tokens: Tensor, mask: Tensor | None, past: DecodingCache | None) -> Cache:
        """What `past` holds, or a new cache for rows with padding before the text."""
        if past is not None and not isinstance(past, DecodingCache):
            rule = "must be what this model returned with use_cache=True"
            raise ValueError(f"past_key_values: {rule}, and is a {type(past).__name__}; leave it out")
        kept = Cache(tokens.new_zeros(len(tokens))) if past is None else past.kept
        shape = [len(tokens), kept.length + tokens.shape[1]]
        if mask is None:
            return kept
        if list(mask.shape) != shape:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}; with the cached columns it must be {shape}")
        padding = kept.padding if past is not None else (mask == 0).sum(1)
        columns = torch.arange(shape[1], device=mask.device)
        if not torch.equal(mask.bool(), columns >= padding[:, None]):
            raise ValueError("attention_mask: with a cache, padding comes before the text; pad left, or give use_cache=False")
        return Cache(padding) if past is None else kept

    def _batch(self, tokens: Tensor, mask: Tensor | None) -> BatchInfo:
        """Each run of padding, and each run of text between, is a document of its own."""
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}; it must be that of input_ids, {list(tokens.shape)}")
        real = torch.ones_like(tokens) if mask is None else mask.long()
        doc_ids = F.pad(real.diff(dim=1).ne(0).long().cumsum(1), (1, 0))
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        starts = torch.where(F.pad(doc_ids.diff(dim=1), (1, 0)) > 0, columns, 0).cummax(1).values
        return BatchInfo(
            tokens=tokens,
            positions=columns - starts,
            doc_ids=doc_ids,
            labels=torch.zeros_like(tokens),
            rows=torch.arange(len(tokens), device=tokens.device),
            segments=find_segments(doc_ids.cpu(), tokens.device, self.dtype),
        )
