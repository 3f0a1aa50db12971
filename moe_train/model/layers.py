"""The small parts of a decoder: projections, norms, rotary tables, the dense MLP and the output head.

Shapes: B rows, S positions, D hidden, F MLP width, V vocabulary, d head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import Backend
from moe_train.model.init import Constant, Normal


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
    """Token embedding [V, D]."""

    def __init__(self, vocab_size: int, size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.initial = {"weight": Normal(std)}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, D]."""
        return F.embedding(tokens, self.weight)


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


class SwiGLU(nn.Module):
    """Dense MLP: (silu(x Wg) * x Wu) Wd (arXiv 2002.05202). Also the shared expert of an MoE layer."""

    def __init__(self, size: int, width: int, std: float, kernels: Backend) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * width, std)
        self.down = Linear(width, size, std)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(self.kernels.swiglu(self.gate_up(x)))


class Head(nn.Module):
    """Output projection. With `tied` the decoder lends the embedding's weight."""

    def __init__(self, size: int, vocab_size: int, std: float, kernels: Backend, tied: bool) -> None:
        super().__init__()
        self.kernels = kernels
        if not tied:
            self.weight = nn.Parameter(torch.empty(vocab_size, size))
            self.initial = {"weight": Normal(std)}

    def forward(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        """hidden [B, S, D] -> logits [B, S, V] in hidden's dtype."""
        return F.linear(hidden, self.weight if weight is None else weight)

    def loss(self, hidden: Tensor, weight: Tensor | None, targets: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        """sum(coef * token loss) [] and the token losses [B, S] in nats, detached; the logits are never all in memory."""
        weight = self.weight if weight is None else weight
        flat = hidden.flatten(0, 1)
        total, token_loss = self.kernels.linear_cross_entropy(flat, weight, targets.flatten(), coef.flatten())
        return total, token_loss.view_as(targets)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, d / 2] fp32 for positions [B, S] (RoFormer, arXiv 2104.09864, equation 15)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.double()[..., None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()
