"""Naive twin of grouped_mm, in any float dtype, and its documentation.

M rows, E experts, C columns in, N columns out.

Cost at the flagship's up projection (M = 65,536, E = 16, C = 1,280, N = 896, bf16), each tensor moved once; the time is the larger of
FLOPs over peak (312 / 989 / 989 TFLOP/s) and bytes over bandwidth (2.04 / 3.35 / 4.8 TB/s):

| | FLOPs | bytes | A100 | H100 | H200 |
| --- | --- | --- | --- | --- | --- |
| forward | 2 MCN = 150 GFLOP | 2 (MC + MN + ECN) = 322 MB | 482 us | 152 us | 152 us |
| gradient of rows | 150 GFLOP | 322 MB | 482 us | 152 us | 152 us |
| gradient of w | 150 GFLOP | 322 MB | 482 us | 152 us | 152 us |
"""

import torch
from torch import Tensor

from moe_kernels.checks import check_grouped_mm
from moe_kernels.types import Plan


def grouped_mm(rows: Tensor, w: Tensor, plan: Plan) -> Tensor:
    """Each expert's rows times its matrix: out[r] = rows[r] @ w[e]^T for offsets[e] <= r < offsets[e + 1].

    rows [M, C], w [E, N, C] of one float dtype -> [M, N]. Rows at or after offsets[E] are undefined (zero here), are never read and get
    no gradient. Differentiable in rows and w; an expert without rows has a zero gradient.
    Raises KernelError where shapes do not match the plan, dtypes or devices differ, or an argument is not contiguous.
    """
    check_grouped_mm(rows, w, plan)
    bounds = plan.offsets.tolist()
    parts = [rows[start:end] @ we.T for we, start, end in zip(w.unbind(0), bounds, bounds[1:], strict=False)]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - bounds[-1], w.shape[1])])
