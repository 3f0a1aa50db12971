"""What 32-bit indices cannot count is refused by name, and what is just below runs: on meta tensors, which take no memory.

Addresses are 64-bit, so that T * K * D may be anything; `test_offsets_above_2_to_the_31` runs beyond on a GPU.
"""

import pytest
import torch

from moe_kernels import KernelError, get_backend, launch
from moe_kernels.checks import MAX_ROWS
from moe_kernels.configs import Config
from moe_kernels.permutation import with_triton as permutation
from moe_kernels.swiglu import with_triton as swiglu

OPS = get_backend("triton", "cpu") if launch.INTERPRETED else None


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def wide(*shape):
    return meta(*shape, dtype=torch.float32)


def ids(tokens, top_k):
    return meta(tokens, top_k, dtype=torch.int32)


def gru(tokens, width):
    cell = wide(3 * width, width), wide(3 * width, width), wide(3 * width), wide(3 * width)
    return OPS.gru_step(meta(tokens, width), wide(tokens, width), *cell)


def loss(tokens, vocab):
    return OPS.linear_cross_entropy(
        meta(tokens, 8), meta(vocab, 8), meta(tokens, dtype=torch.int64), wide(tokens), chunk=tokens
    )


def experts(tokens, top_k, hidden, ffn):
    x, gate_up, down = meta(tokens, hidden), meta(2, 2 * ffn, hidden), meta(2, hidden, ffn)
    return OPS.moe_mlp(x, gate_up, down, ids(tokens, top_k), wide(tokens, top_k))


def grouped(tokens, columns, inner):
    plan = OPS.sort_by_expert(ids(tokens, 1), 2)
    return OPS.grouped_mm(meta(tokens, inner), meta(2, columns, inner), plan)


LIMITS = [  # a call, arguments that are just within what it takes, others just beyond, and what the error says
    (lambda *shape: OPS.sort_by_expert(ids(*shape), 4), (2**28, 4), (2**28 + 1, 4), r"T \* K must be .* expert_ids=\[268435457, 4\]"),
    (experts, (2**28, 4, 1280, 448), (2**28 + 1, 4, 8, 8), r"moe_mlp: T \* K must be .* expert_ids=\[268435457, 4\]"),
    (experts, (2, 1, 2**15, 2**15 - 1), (2, 1, 2**15, 2**15), r"moe_mlp: an expert's matrix \[65536, 32768\] must have fewer"),
    (grouped, (4, 8, 2**23 - 1), (4, 8, 2**23), r"grouped_mm: an expert's matrix \[8, 8388608\] must have fewer than 2\^31 el"),
    (grouped, (4, 2**23 - 1, 8), (4, 2**23, 8), r"matrix \[8388608, 8\] must have .* 2\^23 rows and columns"),
    (lambda t, p: OPS.score_topk(meta(t, p), wide(4, p), 2), (MAX_ROWS, 8), (MAX_ROWS + 1, 8), r"T up to 2\^30.*hidden=\[1073741825"),
    (lambda t, p: OPS.score_topk(meta(t, p), wide(1024, p), 2), (2, 2**20), (2, 2**20 + 1), r"P up to 2\^20.*hidden=\[2, 1048577\]"),
    (gru, (MAX_ROWS, 8), (MAX_ROWS + 1, 8), r"gru_step: .* T up to 2\^30 .* z=\[1073741825, 8\]"),
    (gru, (2, 2**14), (2, 2**14 + 1), r"gru_step: .* P up to 16384.* z=\[2, 16385\]"),
    (lambda t: OPS.rms_norm(meta(t, 8), wide(8), 0.0), (MAX_ROWS,), (MAX_ROWS + 1,), r"rms_norm: .* 2\^30 rows .* x=\[1073741825, 8\]"),
    (lambda t: OPS.add_rms_norm(meta(2, t, 8), meta(2, t, 8), wide(8), 0.0), (2**29,), (2**29 + 1,), r"add_rms_norm: .* 2\^30 rows"),
    (lambda s: OPS.rope(meta(1, s, 4, 8), wide(1, s, 4), wide(1, s, 4)), (2**28,), (2**28 + 1,), r"rope: B \* S \* H must be at most"),
    (lambda m: OPS.swiglu(meta(m, 8)), (MAX_ROWS,), (MAX_ROWS + 1,), r"swiglu: .* 2\^30 rows .* gate_up=\[1073741825, 8\]"),
    (loss, (MAX_ROWS, 8), (MAX_ROWS + 1, 8), r"linear_cross_entropy: .* T and V up to 2\^30 .* x=\[1073741825, 8\]"),
    (loss, (8, MAX_ROWS), (8, MAX_ROWS + 1), r"linear_cross_entropy: .* T and V up to 2\^30 .* w=\[1073741825, 8\]"),
]  # fmt: skip


@pytest.mark.skipif(OPS is None, reason="a machine with a GPU has other limits: its memory")
@pytest.mark.parametrize(("call", "within", "beyond", "message"), LIMITS, ids=[message[:40] for *_, message in LIMITS])
def test_counts_that_32_bits_do_not_hold_are_refused(call, within, beyond, message):
    call(*within)
    with pytest.raises(KernelError, match=message):
        call(*beyond)


@pytest.mark.parametrize("grid", [(2**31,), (1, 2**16), (1, 1, 2**16)])
def test_a_grid_that_cuda_cannot_launch(grid):
    x = torch.empty(3, 2)
    config = Config(1, 1, 1, 4, 1)
    with pytest.raises(
        KernelError, match=r"_forward: a grid of \(.*\) programs is above CUDA's .*; got gate_up=\[3, 2\], y=\[3, 1\]"
    ):
        launch.launch(swiglu._forward, grid, config, x, x[:, :1], 3, F=1, ROWS=1, COLUMNS=1)


def test_too_many_columns_for_a_grid():
    """Without a buffer so large: its shape is what counts."""
    rows = torch.empty(1, 1).expand(1, 2**24 + 1)
    index = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"_copy_rows: a grid of \(1, 65537\).* x=\[1, 16777217\]"):
        permutation.copy_rows(rows, *index)
