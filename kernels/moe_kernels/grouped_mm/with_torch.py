"""grouped_mm on any device through torch's own grouped GEMM; the signature is documented in reference.py."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.checks import check_grouped_mm
from moe_kernels.grouped_mm.op import define
from moe_kernels.types import Plan, TileMap


def grouped_mm(rows: Tensor, w: Tensor, plan: Plan) -> Tensor:
    """Each expert's rows times its matrix, transposed: rows [M, C], w [E, N, C] -> [M, N]."""
    check_grouped_mm(rows, w, plan)
    return _op(rows, w, plan)


def rows_by_weights(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """rows[r] @ w[e] for each expert's rows: [M, C], [E, C, N] (any strides) -> [M, N], contiguous."""
    if rows.dtype == torch.float64:
        bounds = offsets.tolist()
        out = rows.new_zeros(rows.shape[0], w.shape[2])
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            out[start:end] = rows[start:end] @ w[expert]
        return out
    columns = w.shape[2]
    rows, w = _pad(rows), _pad(w)
    return F.grouped_mm(rows, w, offs=offsets[1:])[:, :columns].contiguous()


def rows_by_rows(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each expert's rows of a[r] b[r]^T: [M, N], [M, C] -> [E, N, C], contiguous; zero for an expert without rows."""
    if a.dtype == torch.float64:
        bounds = offsets.tolist()
        return torch.stack([a[start:end].T @ b[start:end] for start, end in itertools.pairwise(bounds)])
    out = F.grouped_mm(_pad(a).T, _pad(b), offs=offsets[1:])
    return out[:, : a.shape[1], : b.shape[1]].contiguous()


def _forward(rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> Tensor:
    return rows_by_weights(rows, w.mT, offsets)


def _backward(grad: Tensor, rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> tuple[Tensor, Tensor]:
    return rows_by_weights(grad, w, offsets), rows_by_rows(grad, rows, offsets)


def _pad(matrix: Tensor) -> Tensor:
    """The same matrix with zeros added until both of its last dims are multiples of 16 bytes, as grouped_mm's strides must be."""
    unit = 16 // matrix.element_size()
    columns = -matrix.shape[-1] % unit
    inner = (
        -matrix.shape[-2] % unit if matrix.dim() == 3 else 0
    )  # the rows of a 2-D operand are the ragged dim, of stride 1 never
    return F.pad(matrix, (0, columns, 0, inner)) if columns or inner else matrix


_op = define("torch", _forward, _backward)
