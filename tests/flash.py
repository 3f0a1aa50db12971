"""What the functions of flash attention are documented to compute, slowly, on any device and in any dtype."""

import itertools

import torch
from torch import Tensor

from moe_train.model.attention import attend
from moe_train.model.attention_kernels import AttentionKernel, FlashAttention


def flash_like(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int, **kwargs: bool
) -> Tensor:
    """What the variable-length form of flash attention is documented to compute: causal from the bottom right corner of each run."""
    assert q_bounds.dtype == k_bounds.dtype == torch.int32
    assert (q_bounds[-1], k_bounds[-1]) == (len(q), len(k))
    assert int(q_bounds.diff().max()) <= longest_q
    assert int(k_bounds.diff().max()) <= longest_k
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = []
    for (start, end), (first, last) in zip(*(itertools.pairwise(x.tolist()) for x in (q_bounds, k_bounds)), strict=True):
        assert end > start
        rows, columns = end - start, last - first
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[first:last]) * q.shape[2] ** -0.5
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[first:last]))
    return torch.cat(out)


def causal_rows(q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool) -> Tensor:
    assert causal
    return attend(q, k, v, None)


RUNS = AttentionKernel("flash2", FlashAttention(causal_rows, flash_like), "bounds")
