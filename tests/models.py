"""Small models and batches for tests."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import get_backend
from moe_train import routers
from moe_train.cli import parse
from moe_train.config import Config, ModelConfig
from moe_train.model.attention import find_segments
from moe_train.model.decoder import Decoder
from moe_train.model.init import initialise
from moe_train.model.routing import BatchInfo

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "num_experts": 4, "ffn_hidden_size": 8, "vocab_size": 32}
TOPK = {"name": "topk"}
RECURRENT = {"name": "recurrent", "router_size": 8}


def config_of(router: dict[str, Any] | None = None, **model: Any) -> Config:
    """A tiny run's config."""
    assert routers.registry()
    return parse({"model": {**TINY, "router": router or RECURRENT, **model}}, "test")


def decoder_of(config: ModelConfig, dtype: torch.dtype = torch.float64, backend: str = "torch", seed: int = 0) -> Decoder:
    """A decoder on the CPU with its initial values."""
    model = Decoder(config, get_backend(backend)).to(dtype)
    initialise(model, seed)
    return model


def batch_of(lengths: list[list[int]], seed: int = 0, vocab: int = 32) -> tuple[BatchInfo, Tensor]:
    """Rows that pack documents of these lengths, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets, positions, doc_ids = [], [], [], []
    for row in lengths:
        documents = [torch.randint(0, vocab, (n,), generator=generator) for n in row]
        tokens.append(torch.cat(documents))
        targets.append(torch.cat([torch.cat([d[1:], torch.tensor([-100])]) for d in documents]))
        positions.append(torch.cat([torch.arange(n) for n in row]))
        doc_ids.append(torch.cat([torch.full((n,), i) for i, n in enumerate(row)]))
    return make_batch(torch.stack(tokens), torch.stack(positions), torch.stack(doc_ids)), torch.stack(targets)


def make_batch(tokens: Tensor, positions: Tensor, doc_ids: Tensor, token_count: int = 0, target_count: int = 0) -> BatchInfo:
    """A batch of packed rows with the counts given (default: its own tokens)."""
    return BatchInfo(
        tokens=tokens,
        positions=positions,
        doc_ids=doc_ids,
        labels=torch.zeros_like(tokens),
        rows=torch.arange(len(tokens)),
        segments=find_segments(doc_ids, CPU, torch.float32),
        token_count=token_count or tokens.numel(),
        target_count=target_count or tokens.numel(),
    )
