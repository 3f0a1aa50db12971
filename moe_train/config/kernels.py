"""Rules between the kernels that are asked for, the device, the dtype and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_train.config.base import Conflict

if TYPE_CHECKING:
    from moe_train.config.run import Config

CUDA_BACKENDS = ("triton", "megablocks")
FLASH = ("varlen", "flash2", "flash3")


def kernel_conflicts(config: Config) -> list[Conflict]:
    """Every broken rule of `kernels` that can be seen without the device."""
    return [*_backend_conflicts(config), *_attention_conflicts(config)]


def _backend_conflicts(config: Config) -> list[Conflict]:
    train, backend = config.train, config.kernels.backend
    found = []
    if train.device == "cpu" and backend in CUDA_BACKENDS:
        found.append(Conflict("kernels.backend", backend, "needs CUDA, and train.device is cpu", "use auto"))
    if train.dtype == "fp64" and backend not in ("reference", "torch"):
        rule = "must be reference or torch where train.dtype is fp64"
        found.append(Conflict("kernels.backend", backend, rule, "set it to one of the two"))
    return found + (_megablocks_conflicts(config) if backend == "megablocks" else [])


def _megablocks_conflicts(config: Config) -> list[Conflict]:
    model = config.model
    rules: list[tuple[str, str]] = []
    if config.train.dtype == "fp32":
        rules.append(("its grouped GEMM computes in bf16 alone", "use train.dtype=bf16"))
    widths = {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size over parallel.expert_tp": model.ffn_hidden_size // config.parallel.expert_tp,
    }
    for name, width in widths.items():
        if width % 8:
            rules.append((f"needs widths that are multiples of 8; model.{name} is {width}", "use auto, or change the width"))
    if model.block == "transformer_xl":
        rules.append(("needs widths that are multiples of 8, and the biases of transformer_xl's experts add one", "use auto"))
    return [Conflict("kernels.backend", "megablocks", rule, remedy) for rule, remedy in rules]


def _attention_conflicts(config: Config) -> list[Conflict]:
    train, model, name = config.train, config.model, config.kernels.attention
    found = []
    if name not in ("auto", "sdpa") and train.device == "cpu":
        found.append(Conflict("kernels.attention", name, "needs CUDA, and train.device is cpu", "use auto"))
    if name in FLASH and train.dtype in ("fp32", "fp64"):
        rule = f"computes in 16 bits, and train.dtype is {train.dtype}"
        found.append(Conflict("kernels.attention", name, rule, "use auto, or train.dtype=bf16"))
    if name in FLASH and (model.head_size % 8 or model.head_size > 256):
        rule = f"needs heads whose width is a multiple of 8 and at most 256; model.head_dim is {model.head_size}"
        found.append(Conflict("kernels.attention", name, rule, "use auto, or change the heads"))
    if name != "auto" and model.block == "transformer_xl":
        rule = "model.block=transformer_xl computes attention by distance in its own way"
        found.append(Conflict("kernels.attention", name, rule, "use auto"))
    return found
