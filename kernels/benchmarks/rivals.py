"""Other implementations of the expert MLP, called as their own authors call them.

A rival is imported from wherever Python finds it. Every one starts from the same (expert ids, routing weights): its own sort,
permutation and metadata are part of what is timed, and a router's softmax and top-k are not. Weights are brought into its layout
beforehand. All of them are checked, output and gradients, against the reference that ours are checked against.

T tokens, E experts, K choices, D hidden, F expert hidden; w_gate_up [E, 2F, D] with F gate rows first, w_down [E, D, F].
"""

import hashlib
import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from machine import installed_version
from report import one_line
from torch import Tensor, nn

Gradients = tuple[Tensor, ...]


@dataclass
class MoeCall:
    """A rival ready to run on one problem."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]  # x, the parameters in the rival's layout, the routing weights
    to_ours: Callable[[Gradients], Gradients]  # gradients of the leaves -> of x, w_gate_up, w_down and the routing weights
    note: str = ""


class Rival(ABC):
    """What the harness asks of a rival."""

    name: ClassVar[str]
    distribution: ClassVar[str]  # as pip calls it
    modules: ClassVar[tuple[str, ...]]  # what `make` imports
    needs_cuda: ClassVar[bool] = True
    commit: str | None = None  # said by who runs the benchmark, where the sources do not know it

    def version(self) -> str:
        """Version or commit; of a source tree without either, a fingerprint of its Python files."""
        return describe_version(self.modules[0].partition(".")[0], self.distribution, self.commit)

    def why_unavailable(self, device: torch.device) -> str | None:
        """One line, or None where it can run."""
        if self.needs_cuda and device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        return why_not_importable(self.modules)

    @abstractmethod
    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """Bring the inputs into the rival's layouts. ids [T, K] int32, weights [T, K] fp32 whose values x's dtype holds."""


def why_not_importable(modules: tuple[str, ...]) -> str | None:
    """Why one of these modules cannot be imported, in one line."""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # a package for another torch or CUDA may raise anything while it is imported
        return one_line(error)
    return None


def describe_version(package: str, distribution: str, commit: str | None = None) -> str:
    """The installed version and the commit, as far as they are known, else a fingerprint of the package's Python files."""
    parts = [installed_version(distribution), commit and f"commit {commit}"]
    known = " ".join(part for part in parts if part)
    return known or f"sources sha256 {_fingerprint(package)}"


def _fingerprint(package: str) -> str:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return "unknown"
    digest = hashlib.sha256()
    for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def leaf(tensor: Tensor) -> Tensor:
    """The same memory as a leaf of its own."""
    return tensor.detach().requires_grad_()


class ScatterMoe(Rival):
    """github.com/shawntan/scattermoe: its GLUMLP, whose first F rows are up and whose gate comes second."""

    name = "scattermoe"
    distribution = "scattermoe"
    modules = ("scattermoe.mlp",)

    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """ids as torch.topk gives them (int64) and weights in x's dtype, which its batched product with the outputs needs."""
        from scattermoe.mlp import GLUMLP

        experts, hidden, ffn = w_down.shape
        with torch.device("meta"):
            mlp = GLUMLP(hidden, ffn, experts, ids.shape[1])
        mlp.experts.weight = nn.Parameter(w_gate_up.roll(ffn, 1))
        mlp.output_experts.weight = nn.Parameter(w_down.detach())
        x, weights, ids = leaf(x), leaf(weights.to(x.dtype)), ids.long()
        return MoeCall(
            forward=lambda: mlp(x, weights, ids),
            leaves=(x, mlp.experts.weight, mlp.output_experts.weight, weights),
            to_ours=lambda grads: (grads[0], grads[1].roll(ffn, 1), *grads[2:]),
        )


class Liger(Rival):
    """github.com/linkedin/Liger-Kernel: LigerFusedMoEFunction, with our layouts. It tunes once for each (D, F)."""

    name = "liger"
    distribution = "liger_kernel"
    modules = ("liger_kernel.ops.fused_moe",)

    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """Weights in x's dtype: as its module for transformers gets them, and the dtype in which it adds up their gradient anyway."""
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        leaves = (leaf(x), leaf(w_gate_up), leaf(w_down), leaf(weights.to(x.dtype)))
        return MoeCall(
            forward=lambda: LigerFusedMoEFunction.apply(*leaves[:3], ids, leaves[3]),
            leaves=leaves,
            to_ours=lambda grads: grads,
        )


class SonicMoe(Rival):
    """github.com/Dao-AILab/sonic-moe: the steps of moe_TC_softmax_topk_layer after its router.

    Rows of its up projection alternate: gate 0, up 0, gate 1, up 1. Needs D a multiple of 64 and at least 512, F a multiple of 64.
    """

    name = "sonicmoe"
    distribution = "sonicmoe"
    modules = ("sonicmoe", "sonicmoe.functional", "sonicmoe.enums", "sonicmoe.count_cumsum")

    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """Its weights are [2F, D, E] and [D, F, E] views of our memory order; its routing weights are fp32."""
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import TC_topk_router_metadata, _DownProjection, _UpProjection

        experts, _, ffn = w_down.shape
        tokens, top_k = ids.shape
        stream = torch.cuda.current_stream().cuda_stream
        paired = leaf(w_gate_up.unflatten(1, (2, ffn)).transpose(1, 2).flatten(1, 2).contiguous())
        x, w_down, weights = leaf(x), leaf(w_down), leaf(weights)
        count, note = self._counter(ids, experts)

        def forward() -> Tensor:
            offsets, gather, scatter, reverse, per_token = TC_topk_router_metadata(ids, count(ids.view(-1)), top_k)
            index = (gather, scatter, reverse, per_token, False)
            swiglu = ActivationType.SWIGLU
            y, z = _UpProjection.apply(
                x, paired.permute(1, 2, 0), None, offsets, tokens * top_k, top_k, stream, *index, swiglu, False
            )
            return _DownProjection.apply(
                y, z, w_down.permute(1, 2, 0), None, weights, offsets, tokens, top_k, stream, *index, swiglu
            )

        return MoeCall(
            forward=forward,
            leaves=(x, paired, w_down, weights),
            to_ours=lambda grads: (grads[0], grads[1].unflatten(1, (ffn, 2)).transpose(1, 2).flatten(1, 2), *grads[2:]),
            note=note,
        )

    @staticmethod
    def _counter(ids: Tensor, experts: int) -> tuple[Callable[[Tensor], Tensor], str]:
        """Inclusive prefix sums of the rows per expert: its CUDA kernel, which it builds when first called, or else torch's ops."""
        from sonicmoe.count_cumsum import count_cumsum

        def native(flat: Tensor) -> Tensor:
            return count_cumsum(flat, experts, do_cumsum=True)[1]

        def portable(flat: Tensor) -> Tensor:
            counts = torch.zeros(experts, dtype=torch.int32, device=flat.device)
            return counts.scatter_add_(0, flat.long(), torch.ones_like(flat)).cumsum(0, dtype=torch.int32)

        try:
            native(ids.view(-1))
        except Exception as error:  # no compiler, another CUDA: the grouped products are what is compared
            return portable, f"its count_cumsum kernel could not be built, torch ops instead: {one_line(error)}"
        return native, ""


class MegaBlocks(Rival):
    """github.com/databricks/megablocks: its dropless grouped path (GroupedGLU), on the grouped_gemm package. Syncs with the host."""

    name = "megablocks"
    distribution = "megablocks"
    modules = ("megablocks.ops", "grouped_gemm")

    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """Gate, up and down weights are [E, F, D] each."""
        import grouped_gemm
        from megablocks import ops

        gmm = grouped_gemm.ops.gmm
        experts, top_k = w_down.shape[0], ids.shape[1]
        bits = max(math.ceil(math.log2(experts)), 1)
        gate, up = (leaf(part.contiguous()) for part in w_gate_up.chunk(2, 1))
        down = leaf(w_down.mT.contiguous())
        x, weights = leaf(x), leaf(weights.to(x.dtype))

        def forward() -> Tensor:
            with torch.no_grad():
                flat = ids.flatten()
                bin_ids, indices = ops.sort(flat, bits)
                counts = ops.histogram(flat, experts)
                bins = ops.inclusive_cumsum(counts, 0).view(-1)
            rows = ops.gather(x, indices, bin_ids, bins, top_k)
            sizes = counts.cpu().to(torch.long)
            y = nn.functional.silu(gmm(rows, gate, sizes, trans_b=True)) * gmm(rows, up, sizes, trans_b=True)
            return ops.scatter(gmm(y, down, sizes), indices, bin_ids, weights.flatten(), bins, top_k)

        return MoeCall(
            forward=forward,
            leaves=(x, gate, up, down, weights),
            to_ours=lambda grads: (grads[0], torch.cat(grads[1:3], 1), grads[3].mT, grads[4]),
        )


class Transformers(Rival):
    """Hugging Face transformers 5: Qwen3's experts module with its `grouped_mm` implementation (torch's grouped GEMM, index ops)."""

    name = "transformers"
    distribution = "transformers"
    modules = ("transformers.integrations.moe", "transformers.models.qwen3_moe.modeling_qwen3_moe")
    needs_cuda = False

    def make(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> MoeCall:
        """Our layouts; routing weights in x's dtype, as its router gives them, and ids as torch.topk gives them (int64)."""
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        experts, hidden, ffn = w_down.shape
        sizes: dict[str, Any] = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": ffn}
        config = SimpleNamespace(**sizes, hidden_act="silu", _experts_implementation="grouped_mm")
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = nn.Parameter(w_gate_up.detach()), nn.Parameter(w_down.detach())
        x, weights, ids = leaf(x), leaf(weights.to(x.dtype)), ids.long()
        return MoeCall(
            forward=lambda: module(x, ids, weights),
            leaves=(x, module.gate_up_proj, module.down_proj, weights),
            to_ours=lambda grads: grads,
        )


# those that tune or build for minutes last, so that a short budget meets the others
RIVALS: tuple[type[Rival], ...] = (ScatterMoe, Transformers, MegaBlocks, SonicMoe, Liger)
