"""What a token costs in floating-point operations, and the rate that utilisation (MFU) is measured against.

Convention: a multiply and an add are 2 FLOP; backward costs twice the forward; so training costs 6 FLOP per active matmul
parameter and token, plus the attention core (scores and weighted values), which is stated twice:

    full     every query meets all S keys: 12 * layers * heads * head width * S
             (PaLM, arXiv 2204.02311, appendix B; torchtitan)
    causal   a query meets half of them: half of that (Megatron-LM)

Active means: attention projections, the experts that a token visits in a layer, shared experts, dense layers, the router (with the
module that all layers share counted once per MoE layer) and the output head. Not counted: embedding look-up, norms, biases,
softmax, optimizer, recomputation, and the masking of packed documents, which makes the attention core cheaper than stated, and what
`train.memory` adds to it. Where
attention knows positions by their distance (block transformer_xl), scores of distances count as a second set of scores.
"""

import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.decoder import Block, Decoder
from moe_train.model.moe import MoE
from moe_train.model.relative_attention import RelativeAttention
from moe_train.model.routing import router_class
from moe_train.model.transformer_xl import TransformerXLBlock


@dataclass(frozen=True)
class Flops:
    """The cost of one token at one sequence length: active matmul parameters by part, and training FLOP."""

    attention: int  # parameters of q, k, v and output projections, all layers
    experts: int  # of the chosen experts
    shared_experts: int
    dense: int  # of dense MLPs
    router: int  # weights that each token's routing uses, the shared cell once per MoE layer
    head: int
    attention_core: int  # training FLOP of scores and weighted values, full attention

    @property
    def matmul_params(self) -> int:
        """Active matmul parameters of one token."""
        return self.attention + self.experts + self.shared_experts + self.dense + self.router + self.head

    @property
    def causal(self) -> float:
        """Training FLOP per token, attention core counted over the half that a causal query sees."""
        return 6 * self.matmul_params + self.attention_core / 2

    @property
    def full(self) -> float:
        """Training FLOP per token, attention core counted over all keys."""
        return 6 * self.matmul_params + self.attention_core


def count_flops(config: ModelConfig, seq_len: int) -> Flops:
    """Cost per token of the model that `config` describes (`vocab_size` set) on rows of `seq_len` tokens.

    Weights are counted on a model built on meta, so a new router is counted without a formula of its own: each entry of a
    parameter with two or more dimensions is one multiply-add per token, unless `Router.active_params` says otherwise.
    """
    model = _counted(config)
    parts = dict.fromkeys(("attention", "experts", "shared_experts", "dense", "router"), 0)
    for block in model.layers.values():
        for name, count in _parts(block, model).items():
            parts[name] += count
    core = sum(_core(block, config, seq_len) for block in model.layers.values())
    passes = 2 if router_class(config.router).two_passes else 1
    parts = {name: passes * count for name, count in parts.items()}
    return Flops(**parts, head=passes * _head(model), attention_core=passes * core)


def layer_costs(config: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Training FLOP per token of each layer (attention core counted causal), and of the head: what a pipeline shares out."""
    model = _counted(config)
    costs = [6.0 * sum(_parts(block, model).values()) + _core(block, config, seq_len) / 2 for block in model.layers.values()]
    return costs, 6.0 * _head(model)


def _counted(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, _no_kernels())


def _parts(block: nn.Module, model: Decoder) -> dict[str, int]:
    """Active matmul parameters of one block by part."""
    assert isinstance(block, Block | TransformerXLBlock)  # a ModuleDict does not know its values' type
    config, attention = model.config, _matrices(block.attention)
    if isinstance(block.attention, RelativeAttention):  # distances are projected once for all rows
        attention -= _matrices(block.attention.position)
    if not isinstance(block.mlp, MoE):
        return {"attention": attention, "dense": _matrices(block.mlp)}
    return {
        "attention": attention,
        "experts": _matrices(block.mlp.experts) * config.router.active_experts(config) // config.num_experts,
        "shared_experts": _matrices(block.mlp.shared_expert),
        "router": block.mlp.router.active_params() + _matrices(model.shared_router),
    }


def _core(block: nn.Module, config: ModelConfig, seq_len: int) -> int:
    """Training FLOP per token of one block's scores and weighted values, full attention."""
    assert isinstance(block, Block | TransformerXLBlock)
    if block.attention is None:
        return 0
    by_distance = config.block == "transformer_xl" and config.transformer_xl.attn_type != "absolute"
    return (18 if by_distance else 12) * config.num_heads * config.head_size * seq_len


def _head(model: Decoder) -> int:
    return _matrices(model.embedding if model.config.tied_head else model.head)


def _matrices(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.ndim >= 2)


def _no_kernels() -> Backend:
    # Asking for a real backend would log a choice that no run uses.
    def refuse(*_: Any) -> NoReturn:
        raise TypeError("a model that was built to be counted cannot run")

    return Backend("none", *[refuse] * (len(Backend._fields) - 1))


class MatmulRate(NamedTuple):
    """What one device could do."""

    flops: float  # FLOP/s
    source: str  # "peak of NVIDIA H200" or "measured matmul rate"


# Dense bf16 FLOP/s by device name, from NVIDIA's data sheets (half of the figures "with sparsity"); the first match counts.
# A slice of a card (MIG) and a superchip's GPU have other rates and are measured.
_PEAKS = (
    (re.compile(r"\bMIG\b"), None),
    (re.compile(r"\bA100\b"), 312e12),
    (re.compile(r"\bH100 PCIe\b"), 756e12),
    (re.compile(r"\bH[12]00 NVL\b"), 835e12),
    (re.compile(r"\bH[12]00\b"), 989e12),
    (re.compile(r"\bB200\b"), 2250e12),
)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> MatmulRate:
    """The denominator of MFU for one `device`: the published peak of a known GPU in half precision, else a measured rate."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if peak := published_peak(name):
            return MatmulRate(peak, f"peak of {name}")
    return MatmulRate(measured_matmul_rate(device, dtype), "measured matmul rate")


def published_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that CUDA calls `name`; None where it is not known."""
    return next((peak for pattern, peak in _PEAKS if pattern.search(name)), None)


def measured_matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest square matmul of about `seconds` of them, with this process's threads.

    The fastest and not the mean, because another process on the machine can only slow one down.
    """
    size = 1024 if device.type == "cpu" else 8192  # large enough to reach the plateau, small enough for a slow machine
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    _timed_matmul(a, b)  # the first one allocates and chooses an algorithm
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _timed_matmul(a, b))
    return 2 * size**3 / best


def _timed_matmul(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
