"""Which kernel computes attention, and the form in which it takes the documents of packed rows.

| `kernels.attention` | rows of one document | packed rows, and queries of a part of a row (gathered context parallelism) |
|---|---|---|
| `sdpa` | torch's scaled_dot_product_attention | the same with a boolean mask |
| `varlen` | the same | the variable-length form of torch's own flash attention (arXiv 2307.08691), without mask or padding |
| `flash2` | flash-attn 2 | its variable-length form |
| `flash3` | flash-attn 3 (arXiv 2407.08608), for Hopper | its variable-length form |
| `flex` | torch's FlexAttention (arXiv 2412.05496), compiled | the same; blocks that a mask empties are skipped |

All compute the same function. Decoding sees the rows that are kept through a mask, which is sdpa's whatever is chosen.

Shapes: B rows, S positions, Q positions of queries, H query heads, G key and value heads, d head width.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_train.errors import UserError
from moe_train.model.attention import Attend, attend, attend_runs, find_documents
from moe_train.model.routing import Segments
from moe_train.model.segments import find_blocks, find_runs, mask_queries

log = logging.getLogger(__name__)

Form = Literal["mask", "bounds", "blocks"]
FORMS: dict[str, Form] = {"sdpa": "mask", "varlen": "bounds", "flash2": "bounds", "flash3": "bounds", "flex": "blocks"}
HALF = (torch.bfloat16, torch.float16)
FLASH3_MODULES = ("flash_attn_3.flash_attn_interface", "flash_attn_interface")  # as releases and as earlier builds name it
INSTALL = "see docs/install.md (docker/install_gpu.sh installs it)"


class AttentionKernel(NamedTuple):
    """How attention is computed in a run."""

    name: str
    attend: Attend
    form: Form

    def segments(self, doc_ids: Tensor, device: torch.device, queries: Tensor | None = None) -> Segments | None:
        """What `attend` is told of rows that pack documents: doc_ids [B, S] on the CPU; None where each row is one document.

        `queries` [Q] int64 on the CPU: the positions that queries have here, where they are not all of the row.
        """
        if queries is None and self.form != "blocks":
            return find_documents(doc_ids, device, self.form == "bounds")
        positions = torch.arange(doc_ids.shape[1]) if queries is None else queries
        if self.form == "bounds":
            return find_runs(doc_ids, positions, device)
        doc_ids, positions = doc_ids.to(device, non_blocking=True), positions.to(device, non_blocking=True)
        return find_blocks(doc_ids, positions) if self.form == "blocks" else mask_queries(doc_ids, positions)


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    """The kernel called `name` for heads of `head_size` in `dtype`; `auto` takes the fastest that can run. The choice is logged once.

    Raises UserError where a kernel that was asked for by name cannot run.
    """
    if name == "auto":
        name, reason = _automatic(device, dtype, head_size)
    elif why := why_not(name, device, dtype, head_size):
        raise UserError(f"kernels.attention={name}: {why}; or use kernels.attention=auto")
    else:
        reason = "asked for by name"
    return _load(name, device.type, reason)


def why_not(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a kernel cannot run, with the remedy; None where it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, and this run is on {device.type}"
    if name == "flex":
        return None
    if dtype not in HALF:
        return f"computes in 16 bits, and this run in {str(dtype).removeprefix('torch.')}; use train.dtype=bf16"
    if head_size % 8 or head_size > 256:
        return f"needs heads whose width is a multiple of 8 and at most 256, and model.head_dim is {head_size}; change it"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
    if name == "flash3" and capability[0] != 9:
        return f"is for Hopper (compute capability 9.0), and this device has {capability[0]}.{capability[1]}; use flash2"
    try:
        _IMPORTS[name]()
    except ImportError as error:
        return f"cannot be imported ({error}); {INSTALL}"
    return None


def _automatic(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    if why := why_not("varlen", device, dtype, head_size):
        return "sdpa", f"varlen {why}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "varlen", "torch's own flash attention, which has the kernels of flash-attn 2"
    if why := why_not("flash3", device, dtype, head_size):
        return "varlen", f"flash3, which is faster on Hopper, {why}"
    return "flash3", "the fastest on Hopper"


@cache
def _load(name: str, device: str, reason: str) -> AttentionKernel:
    log.info("kernels: attention %s on %s (%s)", name, device, reason)
    return AttentionKernel(name, _MAKE[name](*_IMPORTS[name]()) if name in _MAKE else attend, FORMS[name])


def _import_varlen() -> tuple[Callable]:
    return (importlib.import_module("torch.nn.attention.varlen").varlen_attn,)


def _import_flash2() -> tuple[Callable, Callable]:
    return _flash_functions(importlib.import_module("flash_attn"))


def _import_flash3() -> tuple[Callable, Callable]:
    errors = []
    for module in FLASH3_MODULES:
        try:
            return _flash_functions(importlib.import_module(module))
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


def _flash_functions(module: Any) -> tuple[Callable, Callable]:
    """The functions for whole rows and for runs. Raises ImportError for another package of the same name."""
    rows, runs = (getattr(module, name, None) for name in ("flash_attn_func", "flash_attn_varlen_func"))
    if rows is None or runs is None or not {"causal", "deterministic"} <= inspect.signature(rows).parameters.keys():
        raise ImportError(f"{module.__name__} has no flash_attn_func of the version that is needed")
    return rows, runs


def _import_flex() -> tuple[Callable]:
    return (_compiled_flex(),)


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # called as it is, it would hold all scores


_IMPORTS: dict[str, Callable[[], tuple[Callable, ...]]] = {
    "varlen": _import_varlen,
    "flash2": _import_flash2,
    "flash3": _import_flash3,
    "flex": _import_flex,
}


class FlashAttention:
    """Attention by flash-attn, of which releases 2 and 3 have the same functions."""

    def __init__(self, rows: Callable, runs: Callable) -> None:
        self.rows, self.runs = rows, runs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """q [B, Q, H, d], k and v [B, S, G, d] -> [B, Q, H, d]."""
        if segments is None:
            return _output(self.rows(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled()))
        return attend(q, k, v, segments) if segments.bounds is None else attend_runs(self._runs, q, k, v, segments)

    def _runs(
        self, q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int
    ) -> Tensor:
        exact = torch.are_deterministic_algorithms_enabled()
        return _output(self.runs(q, k, v, q_bounds, k_bounds, longest_q, longest_k, causal=True, deterministic=exact))


def _output(result: Any) -> Tensor:
    """Earlier builds of flash-attn 3 return the log-sum-exp, too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


class FlexAttention:
    """Attention by torch's FlexAttention, which writes a kernel for the mask."""

    def __init__(self, flex_attention: Callable) -> None:
        self.flex_attention = flex_attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """q [B, Q, H, d], k and v [B, S, G, d] -> [B, Q, H, d]."""
        if segments is None or segments.blocks is None:
            return attend(q, k, v, segments)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = self.flex_attention(q, k, v, block_mask=segments.blocks, enable_gqa=grouped)
        return out.transpose(1, 2)


_MAKE: dict[str, Callable[..., Attend]] = {"flash2": FlashAttention, "flash3": FlashAttention, "flex": FlexAttention}
