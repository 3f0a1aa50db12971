"""Which tiles, warps and kernel variant each op uses: a table by architecture, operand size and rows per expert.

It is never tuned at run time, which would differ between ranks and runs (and so would the bits), stall on each new token count and fail
inside of a CUDA graph capture. `benchmarks/tune.py` measures CANDIDATES on a GPU and prints what belongs here.

Ops: `up` (x by w_gate_up, SwiGLU), `down` (rows by w^T), `da` (gradient through down and SwiGLU), `dxe` (rows by w), `dw1` and `dw2`
(gradients of w_gate_up and w_down, one operand gathered), `dw` (that of grouped_mm, none gathered: the same stages would need more
shared memory), `combine` (weighted sum over K). block_m x block_n is the output tile and block_k the step along the reduced axis; for
dw, dw1 and dw2 the output is a tile of the weight and block_k counts rows; for `up` block_n counts gate columns, and as many up columns
come with them.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe_kernels.errors import KernelError

log = logging.getLogger(__name__)

ARCHS = (80, 90, 100)
SIZES = {"large": 256, "medium": 64, "small": 16, "tiny": 0}  # class -> at least so many rows per expert on average
_INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """One choice for one op. Variants: "pointer", "tma" (sm_90 and up) and, for `up` only, "wide" (one accumulator, not two)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    variant: str = "pointer"
    persistent: bool = False  # as many programs as the device holds, each with a loop over tiles
    ctas: int = 1  # programs per multiprocessor of a persistent grid
    flatten: bool = False  # fuse the loop over tiles with the loop over K, so that an epilogue overlaps the next tile's loads
    specialize: bool = False  # producer and consumer warps: needs 4 warps, the tma variant and no gathered operand
    precision: str = "ieee"  # of fp32 operands: "ieee" or "tf32"

    def __str__(self) -> str:
        flags = [name for name in ("persistent", "flatten", "specialize") if getattr(self, name)]
        flags += ["tf32"] if self.precision == "tf32" else []
        return f"{self.variant} {self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}" + "".join(
            f" {flag}" for flag in flags
        )


class Entry(NamedTuple):
    """A config that some table offers, for ahead-of-time compilation."""

    kind: str  # "flagship" (what the flagship shape uses), "table" or "candidate"
    op: str
    config: Config
    archs: tuple[int, ...]
    fp32: bool

    @property
    def label(self) -> str:
        """A name for a test or a table row."""
        return f"{self.kind} {self.op}{' fp32' if self.fp32 else ''} {self.config}"


FLAGSHIP = {"T": 16384, "E": 16, "K": 4, "D": 1280, "F": 448}

C = Config


def _persistent(
    m: int, n: int, k: int, warps: int, stages: int, ctas: int = 1, flatten: bool = False, ws: bool = False
) -> Config:
    return Config(m, n, k, warps, stages, "tma", persistent=True, ctas=ctas, flatten=flatten, specialize=ws)


# Preferred first; a later one serves shapes whose strides TMA cannot address.
_LARGE: dict[int, dict[str, tuple[Config, ...]]] = {
    80: {
        "up": (C(128, 64, 32, 4, 4),),
        "down": (C(128, 128, 32, 4, 4),),
        "da": (C(128, 64, 64, 8, 4),),
        "dxe": (C(128, 128, 32, 4, 4),),
        "dw1": (C(128, 128, 32, 8, 5),),
        "dw2": (C(256, 64, 32, 8, 5),),
        "dw": (C(128, 128, 32, 8, 4),),
        "combine": (C(4, 256, 1, 4, 1),),
    },
    90: {
        "up": (C(128, 64, 64, 8, 4, variant="tma"), C(128, 64, 64, 8, 3)),
        "down": (_persistent(128, 256, 64, 8, 4), C(128, 128, 64, 8, 3)),
        "da": (C(128, 64, 64, 8, 4),),
        "dxe": (_persistent(128, 256, 64, 8, 3), C(128, 128, 64, 8, 3)),
        "dw1": (C(128, 256, 64, 8, 5),),
        "dw2": (C(256, 64, 64, 8, 5),),
        "dw": (C(128, 256, 64, 8, 3),),
        "combine": (C(4, 256, 1, 4, 1),),
    },
}
_SMALLER: dict[str, dict[str, tuple[Config, ...]]] = {  # few rows per expert: weights-bound, the same on every architecture
    "medium": {
        "up": (C(64, 64, 64, 4, 3),),
        "down": (C(64, 128, 64, 4, 3),),
        "da": (C(64, 64, 64, 4, 4),),
        "dxe": (C(64, 128, 64, 4, 3),),
    },
    "small": {
        "up": (C(32, 64, 64, 4, 4),),
        "down": (C(32, 128, 64, 4, 4),),
        "da": (C(32, 64, 128, 4, 3),),
        "dxe": (C(32, 128, 64, 4, 4),),
    },
    "tiny": {
        "up": (C(16, 64, 128, 4, 4),),
        "down": (C(16, 64, 64, 4, 5),),  # of 128 columns Triton 3.6 spills for sm_100
        "da": (C(16, 64, 64, 4, 4),),
        "dxe": (C(16, 128, 64, 4, 5),),
    },
}
_FP32: dict[str, tuple[Config, ...]] = {  # correct and unspilled rather than fast
    "up": (C(32, 32, 32, 4, 2),),
    "down": (C(32, 64, 32, 4, 2),),
    "da": (C(32, 32, 32, 4, 2),),
    "dxe": (C(32, 64, 32, 4, 2),),
    "dw1": (C(64, 32, 32, 4, 2),),
    "dw2": (C(64, 32, 32, 4, 2),),
    "dw": (C(64, 32, 32, 4, 2),),
    "combine": (C(4, 256, 1, 4, 1),),
}
# The interpreter's cost is per program and step, whatever the tile: large tiles, but several of them in the test shapes.
_INTERPRETER: dict[str, tuple[Config, ...]] = {
    "up": (C(64, 64, 128, 4, 1),),
    "down": (C(64, 128, 128, 4, 1),),
    "da": (C(64, 64, 128, 4, 1),),
    "dxe": (C(64, 128, 128, 4, 1),),
    "dw1": (C(128, 128, 64, 4, 1),),
    "dw2": (C(128, 128, 64, 4, 1),),
    "dw": (C(128, 128, 64, 4, 1),),
    "combine": (C(64, 256, 1, 4, 1),),
}

# What benchmarks/tune.py times and the slow tests compile, beside the tables. What spills, or loses an operand from the load pipeline,
# is left out: two accumulators of 128 columns on sm_80, da without its split epilogue, weight gradients with fewer than 5 stages there
# (the row number and then the row are two dependent loads, which cost two stages), warp specialisation of a gathered operand.
_COMBINE = tuple(
    C(rows, columns, 1, warps, 1) for rows, columns, warps in ((1, 256, 1), (1, 512, 2), (2, 256, 2), (4, 256, 4), (8, 256, 8))
)
_PRODUCT_80 = (C(128, 128, 32, 4, 4), C(128, 256, 32, 8, 3), C(128, 256, 64, 8, 3), C(128, 128, 64, 8, 3))
_PRODUCT_90 = (
    *(C(128, 128, 64, 8, 3), C(128, 256, 64, 8, 3)),
    *(C(128, 128, 64, 8, 3, "tma"), C(128, 128, 64, 4, 3, "tma"), C(128, 256, 64, 8, 4, "tma"), C(256, 128, 64, 8, 3, "tma")),
    *(_persistent(128, 256, 64, 8, 3), _persistent(128, 256, 64, 8, 4), _persistent(256, 128, 64, 8, 4)),
    *(_persistent(128, 128, 64, 8, 3, ctas=2), _persistent(128, 128, 64, 4, 3, ctas=2)),
    *(_persistent(128, 256, 64, 8, 3, flatten=True), _persistent(128, 256, 64, 8, 4, flatten=True)),
    _persistent(128, 128, 64, 8, 3, ctas=2, flatten=True),
    *(_persistent(128, 256, 64, 4, 3, ws=True), _persistent(128, 256, 64, 4, 4, ws=True)),
    *(_persistent(128, 128, 64, 4, 4, ws=True), _persistent(256, 128, 64, 4, 3, ws=True)),
)
CANDIDATES: dict[int, dict[str, tuple[Config, ...]]] = {
    80: {
        "up": (
            *(C(128, 64, 32, 4, 4), C(256, 64, 32, 8, 4), C(64, 64, 64, 4, 3)),
            *(C(128, 128, 32, 8, 4, "wide"), C(128, 128, 64, 8, 3, "wide")),
        ),
        "down": _PRODUCT_80,
        "da": (C(128, 64, 64, 8, 4), C(128, 128, 64, 8, 3), C(64, 64, 64, 4, 4)),
        "dxe": _PRODUCT_80,
        "dw1": (C(128, 128, 32, 8, 5), C(128, 256, 32, 8, 5), C(128, 256, 64, 8, 5), C(128, 128, 32, 8, 7)),
        "dw2": (C(256, 64, 32, 8, 5), C(128, 64, 64, 4, 5), C(128, 64, 32, 4, 6)),
        "combine": _COMBINE,
    },
    90: {
        "up": (
            *(C(128, 64, 64, 8, 3), C(256, 64, 64, 8, 3), C(128, 64, 64, 4, 3)),
            *(C(128, 64, 64, 8, 3, "wide"), C(128, 64, 64, 4, 3, "wide")),
            *(
                C(128, 64, 64, 8, 3, "tma"),
                C(128, 64, 64, 8, 4, "tma"),
                C(128, 64, 64, 4, 3, "tma"),
                C(128, 64, 128, 8, 2, "tma"),
            ),
            *(C(256, 64, 64, 8, 3, "tma"), C(256, 64, 64, 8, 4, "tma"), C(256, 64, 32, 8, 5, "tma")),
            *(C(128, 128, 64, 8, 3, "tma"), C(128, 128, 64, 8, 4, "tma"), C(64, 128, 64, 4, 3, "tma")),
            *(_persistent(128, 64, 64, 8, 3, ctas=2), _persistent(256, 64, 64, 8, 4), _persistent(128, 128, 64, 8, 4)),
            *(_persistent(128, 64, 64, 8, 3, ctas=2, flatten=True), _persistent(256, 64, 64, 8, 3, flatten=True)),
            _persistent(128, 128, 64, 8, 3, flatten=True),
        ),
        "down": _PRODUCT_90,
        "da": (
            *(C(128, 64, 64, 8, 3), C(128, 64, 64, 8, 4), C(64, 64, 64, 4, 4), C(64, 128, 64, 4, 3), C(256, 64, 64, 8, 3)),
            *(
                C(128, 64, 64, 8, 3, "tma"),
                C(128, 64, 64, 8, 4, "tma"),
                C(64, 64, 64, 4, 4, "tma"),
                C(64, 128, 64, 4, 3, "tma"),
            ),
            *(C(128, 128, 64, 8, 3, "tma"), C(128, 128, 64, 8, 4, "tma"), C(256, 64, 64, 8, 3, "tma")),
            *(_persistent(128, 64, 64, 8, 3, ctas=2), _persistent(128, 128, 64, 8, 3)),
        ),
        "dxe": (*_PRODUCT_90, _persistent(128, 256, 128, 8, 2)),
        "dw1": (
            *(
                C(128, 256, 64, 8, 5),
                C(128, 256, 32, 8, 7),
                C(256, 128, 64, 8, 5),
                C(128, 128, 64, 8, 5),
                C(128, 128, 32, 8, 7),
            ),
            *(C(128, 256, 64, 8, 4, "tma"), C(128, 256, 64, 8, 5, "tma"), C(256, 128, 64, 8, 5, "tma")),
            *(C(128, 128, 64, 8, 4, "tma"), C(128, 128, 64, 8, 5, "tma"), C(128, 128, 64, 4, 5, "tma")),
        ),
        "dw2": (
            *(C(256, 64, 64, 8, 5), C(256, 64, 32, 8, 7), C(128, 64, 64, 4, 5), C(128, 128, 64, 8, 5), C(256, 128, 64, 8, 5)),
            *(
                C(256, 64, 64, 8, 5, "tma"),
                C(256, 64, 64, 8, 4, "tma"),
                C(128, 64, 64, 4, 5, "tma"),
                C(128, 64, 64, 8, 5, "tma"),
            ),
            *(C(128, 128, 64, 8, 5, "tma"), C(256, 128, 64, 8, 5, "tma")),
        ),
        "combine": _COMBINE,
    },
}

_overrides: dict[str, Config] = {}
_pinned: str | None = None
_tf32 = False


@contextmanager
def override(choices: Mapping[str, Config]) -> Iterator[None]:
    """Within this block, the ops named in `choices` use that config, whatever the tables say (tuning and tests)."""
    global _overrides
    before, _overrides = _overrides, {**_overrides, **choices}
    try:
        yield
    finally:
        _overrides = before


@contextmanager
def batch_invariant(size: str = "large") -> Iterator[None]:
    """Within this block, every batch uses the configs of one size class: a token's result does not depend on the others beside it."""
    global _pinned
    if size not in SIZES:
        raise KernelError(f"batch_invariant: size={size!r} must be one of {', '.join(SIZES)}")
    before, _pinned = _pinned, size
    try:
        yield
    finally:
        _pinned = before


@contextmanager
def allow_tf32(enabled: bool = True) -> Iterator[None]:
    """Within this block, products of fp32 operands round them to tf32 (ten bits of mantissa) and use the tensor cores."""
    global _tf32
    before, _tf32 = _tf32, enabled
    try:
        yield
    finally:
        _tf32 = before


def pick(op: str, *operands: Tensor, rows_per_expert: float = float("inf")) -> Config:
    """The config of `op` for these operands (those that a descriptor might address), from shapes and the device only."""
    if op in _overrides:
        return _overrides[op]
    first = operands[0]
    choices = _choices(op, _arch(first.device), _size(rows_per_expert), first.dtype == torch.float32)
    chosen = next(config for config in choices if config.variant != "tma" or all(map(_addressable, operands)))
    return replace(chosen, precision="tf32") if _tf32 else chosen


def plan_block_rows(slots: int, num_experts: int, device: torch.device) -> int:
    """Rows per tile of a public plan's tile map."""
    return _choices("down", _arch(device), _size(slots / num_experts), False)[0].block_m


def require_supported(op: str, x: Tensor, *weights: Tensor) -> None:
    """Raise KernelError where Triton kernels cannot run on x, or index an expert's matrix of weights [E, P, Q], or 256 rows of P or Q
    columns, with 32 bits."""
    for w in weights:
        if w.shape[1] * w.shape[2] >= 2**31 or max(w.shape[1:]) >= 2**23:
            rule = "must have fewer than 2^31 elements, and 2^23 rows and columns"
            raise KernelError(f"{op}: an expert's matrix {list(w.shape[1:])} {rule}; use kernels.backend=torch")
    if x.dtype == torch.float64:
        raise KernelError(
            f"{op}: float64 is not supported by triton kernels, got {list(x.shape)}; use kernels.backend=torch or reference"
        )
    if x.device.type != "cuda" and not _INTERPRETED:
        raise KernelError(
            f"{op}: triton kernels need CUDA tensors, got {list(x.shape)} on {x.device}; use kernels.backend=torch"
        )


def entries(*ops: str) -> list[Entry]:
    """Every distinct config that a table or the candidate list offers for `ops`, with the architectures that offer it."""
    found: dict[tuple[str, Config, bool], tuple[str, set[int]]] = {}

    def add(kind: str, op: str, config: Config, arch: int, fp32: bool = False) -> None:
        found.setdefault((op, config, fp32), (kind, set()))[1].add(arch)

    pairs = [(arch, op) for arch in ARCHS for op in ops]
    for arch, op in pairs:
        for config in _choices(op, arch, "large", False):
            add("flagship", op, config, arch)
    for arch, op in pairs:
        for size in SIZES:
            for config in _choices(op, arch, size, False):
                add("table", op, config, arch)
        for config in _choices(op, arch, "large", True):
            add("table", op, config, arch, True)
    for arch, op in pairs:
        for config in CANDIDATES.get(arch, {}).get(op, ()):
            add("candidate", op, config, arch)
    return [Entry(kind, op, config, tuple(sorted(archs)), fp32) for (op, config, fp32), (kind, archs) in found.items()]


def operand_type(fp32: bool) -> str:
    """The Triton type of the operands in an ahead-of-time compilation."""
    return "fp32" if fp32 else "bf16"


def _size(rows_per_expert: float) -> str:
    return _pinned or next(name for name, least in SIZES.items() if rows_per_expert >= least)


def _choices(op: str, arch: int, size: str, fp32: bool) -> tuple[Config, ...]:
    if arch == 0:
        return _INTERPRETER[op]
    if fp32:
        return _FP32[op]
    return _SMALLER.get(size, {}).get(op) or _LARGE[min(arch, 90)][op]


def _addressable(operand: Tensor) -> bool:
    """Whether a TMA descriptor can address it: 16-byte aligned, every stride but the last a multiple of 16 bytes."""
    unit = 16 // operand.element_size()
    return operand.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in operand.stride()[:-1])


@torch.compiler.assume_constant_result  # torch.compile must not trace a query of the device
def _arch(device: torch.device) -> int:
    """80, 90 or 100; the nearest lower one for a chip without entries of its own; 0 under the interpreter."""
    return 0 if _INTERPRETED else _device_arch(device)


@cache
def _device_arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    arch = max((known for known in ARCHS if known <= major * 10 + minor), default=ARCHS[0])
    if arch != major * 10 + minor:
        log.info("kernels: no table for sm_%d%d, using that of sm_%d", major, minor, arch)
    return arch
