"""Causal self-attention with rotary positions, grouped keys and values, and documents that do not see each other.

Shapes: B rows, S positions, D hidden, H query heads, G key and value heads, d head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.config import ModelConfig
from moe_train.model.layers import Linear, RMSNorm
from moe_train.model.routing import BatchInfo, Segments

Rotary = tuple[Tensor, Tensor]
KeyValues = tuple[Tensor, Tensor]  # [B, S, G, d] each
Attend = Callable[[Tensor, Tensor, Tensor, "Segments | None"], Tensor]
RunsKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with RoPE and optional RMSNorm on query and key heads.

    `attend` is replaced from outside: by another kernel, and where ranks share positions out.
    """

    attend: Attend

    def __init__(self, config: ModelConfig, kernels: Backend) -> None:
        super().__init__()
        self.head_dim, self.kernels, self.attend = config.head_size, kernels, attend
        size, std, wide, narrow = config.hidden_size, config.init_std, config.num_heads, config.kv_heads
        self.q = Linear(size, wide * self.head_dim, std)
        self.k = Linear(size, narrow * self.head_dim, std)
        self.v = Linear(size, narrow * self.head_dim, std)
        self.out = Linear(wide * self.head_dim, size, std)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            widths = [count * self.head_dim if config.qk_norm == "width" else self.head_dim for count in (wide, narrow)]
            self.q_norm, self.k_norm = (RMSNorm(width, config.norm_eps, kernels) for width in widths)

    def forward(self, x: Tensor, batch: BatchInfo, rotary: Rotary, seen: KeyValues | None = None) -> Tensor:
        """x [B, S, D] normed hidden rows -> [B, S, D]. `seen`: keys and values of earlier tokens and of x; default those of x."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q = _norm_heads(q, self.q_norm)
        q = self.kernels.rope(q, *rotary)
        k, v = self.keys_values(x, rotary) if seen is None else seen
        return self.out(self.attend(q, k, v, batch.segments).flatten(-2))

    def keys_values(self, x: Tensor, rotary: Rotary) -> KeyValues:
        """x [B, S, D] normed hidden rows -> what queries see of them."""
        k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.k, self.v))
        if self.k_norm is not None:
            k = _norm_heads(k, self.k_norm)
        return self.kernels.rope(k, *rotary), v


def _norm_heads(x: Tensor, norm: RMSNorm) -> Tensor:
    """x [B, S, n, d], each head by itself; or all together (OLMoE, arXiv 2409.02060) where the norm has n * d weights."""
    if norm.weight.numel() == x.shape[-1]:
        return norm(x)
    return norm(x.flatten(-2)).view_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """q [B, S, H, d], k and v [B, S, G, d] -> [B, S, H, d]: causal, inside documents where `segments` gives them.

    torch's own kernels: scaled_dot_product_attention, and the variable-length form of its flash attention for bounds.
    """
    if segments is not None and segments.bounds is not None:
        return attend_runs(_varlen, q, k, v, segments)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if segments is None else segments.mask
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_runs(kernel: RunsKernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """q [B, Q, H, d], k and v [B, S, G, d] -> [B, Q, H, d] through the variable-length form of a flash attention.

    `kernel` takes q [n, H, d], k and v [m, G, d], the bounds of runs in both, and upper bounds of their lengths; a run's last query
    sees its last key.
    """
    assert segments.bounds is not None
    bounds, key_bounds, rows, longest = segments.bounds, segments.key_bounds, q.shape[:2], k.shape[1]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if segments.keys is not None:
        k, v = k[segments.keys], v[segments.keys]
    return kernel(q, k, v, bounds, bounds if key_bounds is None else key_bounds, rows[1], longest).unflatten(0, rows)


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # absent from builds without flash attention

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the `enable_gqa` argument is newer than torch 2.11
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = varlen_attn(q, k, v, q_bounds, k_bounds, longest_q, longest_k, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a tuple only where further results are asked for
    return out


def find_segments(doc_ids: Tensor, device: torch.device, dtype: torch.dtype) -> Segments | None:
    """The documents of packed rows, doc_ids [B, S] on the CPU, as `attend` takes them; None if each row is one document.

    On CUDA in half precision these are bounds for variable-length flash attention; elsewhere it is a mask.
    """
    return find_documents(doc_ids, device, device.type == "cuda" and dtype in (torch.bfloat16, torch.float16))


def find_documents(doc_ids: Tensor, device: torch.device, bounds: bool) -> Segments | None:
    """The same as bounds, or as a mask."""
    if bool((doc_ids == doc_ids[:, :1]).all()):
        return None
    if bounds:
        return Segments(bounds=document_bounds(doc_ids).to(device, non_blocking=True))
    same = doc_ids[:, :, None] == doc_ids[:, None, :]
    return Segments(mask=same.tril()[:, None].to(device, non_blocking=True))


def document_bounds(doc_ids: Tensor) -> Tensor:
    """First token of each document in the flattened rows doc_ids [B, S], then B * S: int32 [n + 1]. A row's start is always one."""
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([doc_ids.numel()])]).to(torch.int32)
