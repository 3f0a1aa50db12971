"""Compile the candidates of a Triton autotuner in parallel, so that a rival's tuning costs GPU seconds and not GPU minutes.

Triton's autotuner compiles a candidate when it times it, one after the other: Liger's fused MoE has about 240 of them for each pair
of widths. What is tried, timed and chosen stays exactly the autotuner's own business.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)


def enable(threads: int | None = None) -> bool:
    """Patch Triton's autotuner; False where this Triton cannot compile asynchronously, and tuning is then serial as ever."""
    threads = threads or min(os.cpu_count() or 1, 16)
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return False
    if threads < 2:
        return False
    pool = ThreadPoolExecutor(threads)
    prune = Autotuner.prune_configs

    def prune_and_compile(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(self, kwargs)  # called once for each new key, just before its candidates are timed
        named = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        try:
            with AsyncCompileMode(pool, ignore_errors=True):
                for config in configs:
                    self.fn.warmup(*self.nargs.values(), grid=kwargs["grid"], **named, **config.all_kwargs())
        except Exception as error:  # a private interface: where it differs, the autotuner compiles as it always did
            log.warning("no parallel compilation of %s: %s", getattr(self.base_fn, "__name__", "a kernel"), error)
        return configs

    Autotuner.prune_configs = prune_and_compile
    return True
