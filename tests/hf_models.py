"""Small checkpoints with weights far enough from zero that logits differ, and router buffers as after some training."""

from pathlib import Path
from typing import Any

import torch

from moe_train import routers
from moe_train.data.tokenizer import ByteTokenizer, Tokenizer
from moe_train.hf.native import Native, empty_decoder, new_config, open_native, whole_checkpoint
from moe_train.model.decoder import Decoder
from moe_train.model.init import initialise

TINY = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "ffn_hidden_size": 16}
TRAINED = ("means", "dispersions", "moved", "expert_bias")  # buffers that are zero before the first step


def write_checkpoint(out: Path, tokenizer: Tokenizer | None = None, seq_len: int = 96, **model: Any) -> Native:
    """A checkpoint of step 0 at `out`."""
    assert routers.registry()
    tokenizer = tokenizer or ByteTokenizer()
    vocab = {"vocab_size": -(-tokenizer.vocab_size // 64) * 64}
    content = {"model": TINY | vocab | model, "train": {"seq_len": seq_len, "device": "cpu"}}
    config = new_config(content, tokenizer, out)
    with whole_checkpoint(out, config, tokenizer, lambda: _drawn(empty_decoder(config).to_empty(device="cpu"))):
        pass
    return open_native(out)


@torch.no_grad()
def _drawn(model: Decoder) -> Decoder:
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.mul_(1 + 2 * torch.rand((), generator=generator)).add_(
            0.02 * torch.randn(parameter.shape, generator=generator)
        )
    for name, buffer in model.named_buffers():
        if name.endswith(TRAINED):
            buffer.uniform_(0.1, 0.5, generator=generator)
        if name.endswith("updates"):
            buffer.fill_(5)
    return model
