"""grouped_mm through MegaBlocks' grouped GEMM; the signature is documented in reference.py."""

from torch import Tensor

from moe_kernels import megablocks
from moe_kernels.checks import check_grouped_mm
from moe_kernels.grouped_mm.op import define
from moe_kernels.types import Plan, TileMap


def grouped_mm(rows: Tensor, w: Tensor, plan: Plan) -> Tensor:
    """Each expert's rows times its matrix, transposed: rows [M, C], w [E, N, C] -> [M, N]."""
    check_grouped_mm(rows, w, plan)
    megablocks.require_supported("grouped_mm", rows, *w.shape[1:])
    return _op(rows, w, plan)


def rows_by_weights(rows: Tensor, w: Tensor, sizes: Tensor) -> Tensor:
    """rows[r] @ w[e] for each expert's rows: [M, C], [E, C, N] (contiguous, or the transpose of what is) -> [M, N]."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, w.shape[2])
    if w.is_contiguous():
        return megablocks.gmm(rows, w, sizes)
    return megablocks.gmm(rows, w.mT, sizes, trans_b=True)


def rows_by_rows(a: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """Sum over each expert's rows of a[r] b[r]^T: [M, N], [M, C] -> [E, N, C]; zero for an expert without rows."""
    if a.shape[0] == 0:
        return a.new_zeros(len(sizes), a.shape[1], b.shape[1])
    return megablocks.gmm(a, b, sizes, trans_a=True)


def _forward(rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> Tensor:
    return rows_by_weights(rows, w.mT, megablocks.group_sizes(offsets))


def _backward(grad: Tensor, rows: Tensor, w: Tensor, offsets: Tensor, tiles: TileMap | None) -> tuple[Tensor, Tensor]:
    sizes = megablocks.group_sizes(offsets)
    return rows_by_weights(grad, w, sizes), rows_by_rows(grad, rows, sizes)


_op = define("megablocks", _forward, _backward)
