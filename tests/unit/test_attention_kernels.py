"""Every attention kernel against naive attention in fp64: packed rows, parts of rows, grouped heads; and which kernel is chosen."""

import inspect
import itertools
import logging
import sys
from types import ModuleType

import pytest
import torch
from flash import RUNS, causal_rows, flash_like
from models import TINY
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from moe_train.cli import parse
from moe_train.config.kernels import kernel_conflicts
from moe_train.errors import UserError
from moe_train.model import attention_kernels
from moe_train.model.attention import attend
from moe_train.model.attention_kernels import FORMS, AttentionKernel, FlashAttention, FlexAttention, choose_attention
from moe_train.parallel.context import deal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = {  # lengths of the documents that each row packs
    "packed": [[5, 1, 10], [16], [2, 2, 12]],
    "whole": [[16], [16]],
    "single tokens": [[1] * 16],
}


def documents(lengths: list[list[int]]) -> Tensor:
    return torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])


def places(length: int) -> dict[str, Tensor | None]:
    """All queries, or those of a rank of gathered context parallelism."""
    ranks = {f"rank {i} of {n}": deal(length, n, "gather")[i] for n in (2, 4) for i in range(n)}
    return {"all": None, **ranks}


def naive(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor, queries: Tensor) -> Tensor:
    """Loops over rows, heads and queries."""
    rows, _, heads, width = q.shape
    per_group = heads // k.shape[2]
    found = []
    for b, i, h in itertools.product(range(rows), range(len(queries)), range(heads)):
        at = int(queries[i])
        seen = [j for j in range(at + 1) if doc_ids[b, j] == doc_ids[b, at]]
        scores = torch.stack([q[b, i, h] @ k[b, j, h // per_group] for j in seen]) * width**-0.5
        found.append(scores.softmax(0) @ v[b, seen, h // per_group])
    return torch.stack(found).view(rows, len(queries), heads, width)


KERNELS = {
    "sdpa": AttentionKernel("sdpa", attend, "mask"),
    "runs": RUNS,
}


def inputs(rows: int, queries: int, keys: int, groups: int = 1, width: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and an upstream gradient, with 4 query heads."""
    generator = torch.Generator().manual_seed(rows + queries)

    def normal(length: int, heads: int) -> Tensor:
        return torch.randn(rows, length, heads, width, generator=generator, dtype=torch.float64)

    return normal(queries, 4), normal(keys, groups), normal(keys, groups), normal(queries, 4)


def gradients(function, leaves: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    out = function(*leaves)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("packing", ROWS)
def test_output_and_gradients(name: str, packing: str, groups: int) -> None:
    doc_ids = documents(ROWS[packing])
    for place, queries in places(16).items():
        if groups != 2 and place not in ("all", "rank 1 of 4"):
            continue
        positions = torch.arange(16) if queries is None else queries
        *leaves, upstream = inputs(len(doc_ids), len(positions), 16, groups)
        segments = KERNELS[name].segments(doc_ids, CPU, queries)
        expected = gradients(lambda q, k, v: naive(q, k, v, doc_ids, positions), leaves, upstream)  # noqa: B023
        actual = gradients(lambda q, k, v: KERNELS[name].attend(q, k, v, segments), leaves, upstream)  # noqa: B023
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=place)


@pytest.mark.parametrize("packing", ROWS)
def test_flex_as_far_as_a_cpu_runs_it(packing: str) -> None:
    """It has no backward pass there, and computes in the open what CUDA compiles."""
    doc_ids, kernel = documents(ROWS[packing]), AttentionKernel("flex", FlexAttention(flex_attention), "blocks")
    for queries in places(16).values():
        positions = torch.arange(16) if queries is None else queries
        q, k, v, _ = inputs(len(doc_ids), len(positions), 16, groups=2)
        out = kernel.attend(q, k, v, kernel.segments(doc_ids, CPU, queries))
        torch.testing.assert_close(out, naive(q, k, v, doc_ids, positions), rtol=1e-10, atol=1e-12)


LONG = {  # documents whose edges are at the edges of blocks of 128, beside them and far from them
    "at edges": [[128, 256, 384], [768]],
    "beside edges": [[127, 2, 127, 384, 128], [300, 468]],
    "short last block": [[200, 130, 300], [629, 1]],
    "single tokens": [[1] * 300, [150] * 2],
}


@pytest.mark.parametrize("packing", LONG)
def test_blocks_are_those_of_the_whole_mask(packing: str) -> None:
    """Under a zigzag split a block may be looked at in vain, but none is left out and none is taken for full that is not."""
    doc_ids, kernel = documents(LONG[packing]), AttentionKernel("flex", FlexAttention(flex_attention), "blocks")
    length = doc_ids.shape[1]
    splits = {n: deal(length, n, "gather") for n in (1, 2, 3) if length % (2 * n) == 0}
    assert len(splits) >= 2
    for n, positions in ((n, positions) for n, split in splits.items() for positions in split):
        found = kernel.segments(doc_ids, CPU, None if n == 1 else positions).blocks
        wanted = create_block_mask(found.mask_mod, len(doc_ids), None, len(positions), length, "cpu")
        assert found.seq_lengths == wanted.seq_lengths
        assert found.BLOCK_SIZE == wanted.BLOCK_SIZE
        assert torch.equal(listed(found, "full_"), listed(wanted, "full_"))
        assert torch.equal(listed(found, "full_", "q"), listed(wanted, "full_", "q"))
        some, needed = listed(found), listed(wanted)
        assert torch.equal(some & needed, needed)
        if len(positions) // 2 % 128 == 0 or n == 1:
            assert torch.equal(some, needed)


def listed(blocks, kind: str = "", of: str = "kv") -> Tensor:
    """The blocks that a block mask lists, [B, H, blocks of queries, blocks of keys] bool, the other way round for `q`."""
    numbers, indices = getattr(blocks, f"{kind}{of}_num_blocks"), getattr(blocks, f"{kind}{of}_indices")
    real = torch.arange(indices.shape[-1]) < numbers[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), real)


@pytest.mark.parametrize("packing", ["beside edges", "short last block"])
def test_flex_over_several_blocks(packing: str) -> None:
    doc_ids, kernel = documents(LONG[packing]), AttentionKernel("flex", FlexAttention(flex_attention), "blocks")
    for queries in (None, deal(doc_ids.shape[1], 3, "gather")[1]):
        q, k, v, _ = inputs(2, doc_ids.shape[1] if queries is None else len(queries), doc_ids.shape[1], groups=2)
        out, expected = (one.attend(q, k, v, one.segments(doc_ids, CPU, queries)) for one in (kernel, KERNELS["sdpa"]))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_blocks_are_found_without_a_mask_of_all_pairs() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.elements = max(
                [self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))]
            )
            return out

    doc_ids, kernel = documents([[4096, 1, 4095]]), AttentionKernel("flex", FlexAttention(flex_attention), "blocks")
    with Largest() as largest:
        kernel.segments(doc_ids, CPU)
    assert largest.elements < 4 * 8192


@pytest.mark.parametrize("form", ["mask", "bounds", "blocks"])
def test_segments_of_rows_and_a_copy_of_them(form: str) -> None:
    functions = {"mask": attend, "bounds": FlashAttention(causal_rows, flash_like), "blocks": FlexAttention(flex_attention)}
    doc_ids, kernel = documents(ROWS["packed"]), AttentionKernel(form, functions[form], form)
    for queries in (None, deal(16, 2, "gather")[0]):
        positions = torch.arange(16) if queries is None else queries
        q, k, v, _ = inputs(6, len(positions), 16)
        out = kernel.attend(q, k, v, kernel.segments(doc_ids, CPU, queries).twice(doc_ids.numel()))
        torch.testing.assert_close(out, naive(q, k, v, doc_ids.repeat(2, 1), positions), rtol=1e-10, atol=1e-12)


def test_runs_hold_no_more_keys_than_a_zigzag_split_needs() -> None:
    doc_ids = torch.zeros(1, 64, dtype=torch.long)
    for ranks, rank in ((2, 0), (2, 1), (8, 0), (8, 3), (8, 7)):
        segments = KERNELS["runs"].segments(doc_ids, CPU, deal(64, ranks, "gather")[rank])
        merged = rank == ranks - 1  # its two chunks are neighbours
        assert len(segments.keys) == (
            64 * (rank + 1 + 2 * ranks - rank) // (2 * ranks) if not merged else 64 * (ranks + 1) // (2 * ranks)
        )


def test_decoding_sees_what_is_kept_through_a_mask() -> None:
    q, k, v, _ = inputs(1, 1, 16)
    mask = AttentionKernel("sdpa", attend, "mask").segments(torch.zeros(1, 16, dtype=torch.long), CPU, torch.tensor([15]))
    for function in (FlashAttention(causal_rows, flash_like), FlexAttention(flex_attention)):
        torch.testing.assert_close(function(q, k, v, mask), naive(q, k, v, torch.zeros(1, 16), torch.tensor([15])))


def package(name: str, *, deterministic: bool = True) -> ModuleType:
    """A flash-attn whose functions have the parameters of the real ones."""
    module = ModuleType(name)

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, deterministic) == (0.0, None, True, False)
        return attend(q, k, v, None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, softmax_scale, causal, deterministic) == (0.0, None, True, False)
        return flash_like(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None  # early builds of 3: a pair

    module.flash_attn_func = flash_attn_func if deterministic else lambda q, k, v: q
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A device of this compute capability, and packages of these names."""

    def make(capability: tuple[int, int], *modules: ModuleType) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name in ("flash_attn", "flash_attn_3", *attention_kernels.FLASH3_MODULES):
            monkeypatch.setitem(sys.modules, name, None)  # an import then fails
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        attention_kernels._load.cache_clear()

    yield make
    attention_kernels._load.cache_clear()


def test_automatic_choice(gpu, caplog: pytest.LogCaptureFixture) -> None:
    def choice(dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> str:
        with caplog.at_level(logging.INFO):
            return choose_attention("auto", CUDA, dtype, head_size).name

    gpu((8, 0), package("flash_attn"))
    assert choice() == "varlen"
    assert choice(torch.float32) == "sdpa"
    assert choice(head_size=12) == "sdpa"
    gpu((9, 0))
    caplog.clear()
    assert choice() == choice() == "varlen"
    (record,) = caplog.records  # once
    assert "flash3, which is faster on Hopper, cannot be imported" in record.message
    assert "docker/install_gpu.sh" in record.message
    gpu((9, 0), package("flash_attn_interface"))
    assert choice() == "flash3"
    gpu((7, 0))
    assert choice() == "sdpa"


def test_on_a_cpu_auto_is_sdpa() -> None:
    kernel = choose_attention("auto", CPU, torch.float32, 16)
    assert (kernel.name, kernel.attend, kernel.form) == ("sdpa", attend, "mask")


@pytest.mark.parametrize(("name", "module"), [("flash2", "flash_attn"), ("flash3", "flash_attn_interface")])
def test_a_package_is_called_as_its_functions_are_declared(name: str, module: str, gpu) -> None:
    gpu((9, 0), package(module))
    kernel = choose_attention(name, CUDA, torch.bfloat16, 8)
    for packing in ("packed", "whole"):
        doc_ids = documents(ROWS[packing])
        q, k, v, _ = inputs(len(doc_ids), 16, 16, groups=2)
        out = kernel.attend(q, k, v, kernel.segments(doc_ids, CPU))
        torch.testing.assert_close(out, naive(q, k, v, doc_ids, torch.arange(16)))


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_size", "capability", "message"),
    [
        ("varlen", CPU, torch.bfloat16, 64, (8, 0), "needs a CUDA device"),
        ("flex", CPU, torch.bfloat16, 64, (8, 0), "needs a CUDA device"),
        ("flash2", CUDA, torch.float32, 64, (8, 0), "use train.dtype=bf16"),
        ("flash2", CUDA, torch.bfloat16, 20, (8, 0), "model.head_dim is 20"),
        ("flash2", CUDA, torch.bfloat16, 264, (8, 0), "at most 256"),
        ("flash2", CUDA, torch.bfloat16, 64, (7, 5), "this device has 7.5"),
        ("flash2", CUDA, torch.bfloat16, 64, (8, 0), "cannot be imported .*docs/install.md"),
        ("flash3", CUDA, torch.bfloat16, 64, (9, 0), "cannot be imported .*docs/install.md"),
        ("flash3", CUDA, torch.bfloat16, 64, (8, 0), "is for Hopper .* use flash2"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(name, device, dtype, head_size, capability, message: str, gpu) -> None:
    gpu(capability)
    with pytest.raises(UserError, match=f"^kernels.attention={name}: .*{message}") as caught:
        choose_attention(name, device, dtype, head_size)
    assert "\n" not in str(caught.value)


def test_another_package_of_that_name_is_refused(gpu) -> None:
    gpu((8, 0), package("flash_attn", deterministic=False))
    with pytest.raises(UserError, match="flash_attn has no flash_attn_func of the version that is needed"):
        choose_attention("flash2", CUDA, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"train": {"device": "cpu"}, "kernels": {"attention": "flash2"}}, ["kernels.attention"]),
        ({"train": {"dtype": "fp32"}, "kernels": {"attention": "varlen", "backend": "megablocks"}}, ["backend", "attention"]),
        ({"kernels": {"attention": "flash3"}, "model": {**TINY, "head_dim": 12}}, ["kernels.attention"]),
        ({"kernels": {"attention": "flex"}, "model": {**TINY, "block": "transformer_xl"}}, ["kernels.attention"]),
        ({"train": {"device": "cpu"}, "kernels": {"backend": "megablocks"}}, ["kernels.backend"]),
        ({"train": {"dtype": "fp64"}, "kernels": {"backend": "megablocks"}}, ["kernels.backend"]),
        (
            {"kernels": {"backend": "megablocks"}, "model": {**TINY, "hidden_size": 20}},
            ["kernels.backend", "model.hidden_size is 20"],
        ),
        ({"kernels": {"backend": "megablocks"}, "model": {**TINY, "block": "transformer_xl"}}, ["transformer_xl's experts"]),
    ],
)
def test_conflicts(settings: dict, paths: list[str]) -> None:
    settings = {"model": TINY, **settings}
    with pytest.raises(UserError) as caught:
        parse(settings, "test")
    for path in paths:
        assert path in str(caught.value)


def test_no_conflict_by_default() -> None:
    assert kernel_conflicts(parse({"model": TINY}, "test")) == []


def test_torch_has_the_function_that_varlen_calls() -> None:
    from torch.nn.attention.varlen import varlen_attn

    inspect.signature(varlen_attn).bind(*range(7), window_size=(-1, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("packing", ROWS)
def test_every_kernel_on_a_gpu(name: str, packing: str, groups: int) -> None:
    doc_ids = documents(ROWS[packing]).repeat_interleave(16, 1)  # 256 positions
    length = doc_ids.shape[1]
    if why := attention_kernels.why_not(name, CUDA, torch.bfloat16, 64):
        pytest.skip(why)
    kernel = choose_attention(name, CUDA, torch.bfloat16, 64)
    truth = AttentionKernel("sdpa", attend, "mask")  # held to the naive twin above
    for queries in places(length).values():
        count = length if queries is None else len(queries)
        *leaves, upstream = (x.bfloat16() for x in inputs(len(doc_ids), count, length, groups, width=64))
        masks, segments = truth.segments(doc_ids, CPU, queries), kernel.segments(doc_ids, CUDA, queries)
        wide = tuple(x.double() for x in leaves)
        expected = gradients(lambda q, k, v: attend(q, k, v, masks), wide, upstream.double())  # noqa: B023
        moved = tuple(x.to(CUDA) for x in leaves)
        actual = gradients(lambda q, k, v: kernel.attend(q, k, v, segments), moved, upstream.to(CUDA))  # noqa: B023
        for a, b in zip(actual, expected, strict=True):
            assert (a.double().cpu() - b).norm() < 1e-2 * b.norm()
