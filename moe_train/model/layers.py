"""The small parts of a decoder: projections, norms, rotary tables, the dense MLP and the output head.

Shapes: B rows, S positions, D hidden, F MLP width, V vocabulary, d head width.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels import Backend
from moe_train.model.init import Constant, Initial, Normal

LOGITS_AT_ONCE = 2**24  # of `Head.difference`: 64 MB in fp32


class Linear(nn.Module):
    """y = x W^T, W [out, in], no bias."""

    def __init__(self, in_size: int, out_size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.initial = {"weight": Normal(std)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Token embedding [V, D]. `lookup` is replaced from outside where ranks share the vocabulary out."""

    lookup: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, vocab_size: int, size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.initial = {"weight": Normal(std)}
        self.lookup = F.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, D]."""
        return self.lookup(tokens, self.weight)


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight (arXiv 1910.07467), statistics in fp32."""

    def __init__(self, size: int, eps: float, kernels: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.initial = {"weight": Constant(1.0)}
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(x + branch, norm(x + branch)) in one pass."""
        return self.kernels.add_rms_norm(x, branch, self.weight, self.eps)


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / std(x) * weight + bias (arXiv 1607.06450), statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.initial = {"weight": Constant(1.0), "bias": Constant(0.0)}
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """Dense MLP: (silu(x Wg) * x Wu) Wd (arXiv 2002.05202), `gate_up` [2, F, D]. Also the shared expert of an MoE layer."""

    def __init__(self, size: int, width: int, std: float, kernels: Backend) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, width, size))
        self.initial = {"gate_up": Normal(std)}
        self.down = Linear(width, size, std)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(self.kernels.swiglu(F.linear(x, self.gate_up.flatten(0, 1))))


class Shards(Protocol):
    """A vocabulary of which each of some ranks holds a part; it combines [n] maxima and sums over them."""

    def gather(self, hidden: Tensor) -> Tensor:
        """This rank's rows [B, S_local, D] -> all that the ranks hold together [B, S, D]."""
        ...

    def start(self, weight: Tensor) -> int:
        """The first row of the vocabulary here."""
        ...

    def mine(self, x: Tensor) -> Tensor:
        """[B, S] -> [B, S_local]."""
        ...

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of the rows here -> of the whole vocabulary."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over the ranks."""
        ...


class Head(nn.Module):
    """Output projection. With `tied` the decoder lends the embedding's weight. `shards` is set from outside of the model."""

    def __init__(self, size: int, vocab_size: int, std: float, kernels: Backend, tied: bool) -> None:
        super().__init__()
        self.kernels = kernels
        self.shards: Shards | None = None
        self.initial: dict[str, Initial] = {"weight": Normal(std)}
        if not tied:
            self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """hidden [B, S_local, D] -> logits [B, S, V] in hidden's dtype."""
        weight = self.weight if weight is None else weight
        if self.shards is None:
            return F.linear(hidden, weight)
        return self.shards.whole(F.linear(self.shards.gather(hidden), weight))

    def loss(self, hidden: Tensor, weight: Tensor | None, targets: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, S_local, D], targets and coef [B, S] -> sum(coef * token loss) [] over the rows here, and their token losses
        [B, S_local] in nats, detached; the logits are never all in memory."""
        weight = self.weight if weight is None else weight
        compute = self.kernels.linear_cross_entropy
        if self.shards is None:
            total, token_loss = compute(hidden.flatten(0, 1), weight, targets.flatten(), coef.flatten())
            return total, token_loss.view_as(targets)
        rows = self.shards.gather(hidden).flatten(0, 1)
        start = self.shards.start(weight)
        total, token_loss = compute(rows, weight, targets.flatten(), coef.flatten(), reduce=self.shards, vocab_start=start)
        token_loss = self.shards.mine(token_loss.view_as(targets))
        here = (self.shards.mine(coef) * token_loss).sum()
        return here + (total - total.detach()), token_loss  # the gradient of all rows, the value of those that are counted here

    def difference(self, one: Tensor, other: Tensor, weight: Tensor | None, coef: Tensor) -> Tensor:
        """sum(coef * (KL(p || q) + KL(q || p)) / 2) [] of the predictions p from `one` and q from `other`, [B, S, D] each; coef [B, S].

        In chunks of tokens, whose logits backward computes again. The vocabulary must be whole here.
        """
        weight = self.weight if weight is None else weight
        chunk = max(LOGITS_AT_ONCE // weight.shape[0], 1)
        parts = zip(*(x.flatten(0, 1).split(chunk) for x in (one, other)), coef.flatten().split(chunk), strict=True)
        terms = [checkpoint(_difference, *part, weight, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(terms).sum()


def _difference(one: Tensor, other: Tensor, coef: Tensor, weight: Tensor) -> Tensor:
    """`Head.difference` of one chunk, [n, D] each: KL(p || q) + KL(q || p) = sum (p - q) (ln p - ln q)."""
    wide = torch.promote_types(one.dtype, torch.float32)
    p, q = (F.linear(x, weight).to(wide).log_softmax(-1) for x in (one, other))
    return (coef * ((p.exp() - q.exp()) * (p - q)).sum(-1)).sum() / 2


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, d / 2] fp32 for positions [B, S] (RoFormer, arXiv 2104.09864, equation 15)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()
