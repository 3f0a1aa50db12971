"""A decoder of moe_train as transformers knows models.

`moe_train.hf.flatten` joins this file, the decoder and one router into the modeling file of an exported folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

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


class MoETrainForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with the interface of a causal language model. Routers stay in fp32 when the rest is cast to 16 bits.

    It keeps no cache: while generating, each token costs a forward pass over the text.
    """

    config_class = MoETrainConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["router", "shared_router"]
    _supports_sdpa = True

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
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
    ) -> dict[str, Tensor | None]:
        """The whole text for each new token, whatever the generation config says of caches."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

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
        past_key_values: None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput:
        """input_ids [B, S] -> logits [B, S, V]; with labels [B, S] (-100 where there is none) the training loss instead.

        `attention_mask` [B, S] is 0 at padding. The loss is the cross entropy per target plus the router's weighted losses, as in
        training; `num_items_in_batch` are the targets that it is divided by. `use_cache` and `return_dict` change nothing.
        Raises ValueError for a cache, or a mask of another shape.
        """
        if past_key_values is not None:
            raise ValueError("past_key_values: this model keeps no cache; leave it out")
        batch = self._batch(input_ids, attention_mask)
        if labels is None:
            return CausalLMOutput(logits=self.decoder(batch).logits)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        own = int((targets >= 0).sum())
        counts = {"target_count": max(int(num_items_in_batch or own), 1), "token_count": batch.tokens.numel()}
        return CausalLMOutput(loss=self.decoder(BatchInfo(**{**vars(batch), **counts}), targets).loss)

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
