"""How much memory a conversion takes, beyond what the process held before."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.errors import UserError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # proc(5)
M_MMAP_THRESHOLD = -3  # mallopt(3)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """`base_bytes`: what is resident before the block; `peak_bytes`: what it adds to that at most, once it has ended.

    Resident is every page that the process can read without a fault: its own, shared ones, and those of mapped files. The peak is the
    kernel's (VmHWM), so that nothing is missed. Raises UserError where the system is not Linux.
    """
    if not RESET.exists():
        raise UserError(f"{RESET}: is not there, and memory is measured on Linux only; leave --memory out")
    RESET.write_text(FORGET_PEAK)
    found = {"base_bytes": _resident("VmRSS")}
    yield found
    found["peak_bytes"] = _resident("VmHWM") - found["base_bytes"]


def free_at_once() -> None:
    """Give tensors back to the system when they are freed, for the rest of the process.

    glibc learns to keep freed blocks of up to 32 MB, whose gaps add up to a third of a model while experts are stacked. Other C
    libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def _resident(key: str) -> int:
    """Bytes."""
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    return next(int(value.split()[0]) * 1024 for name, _, value in lines if name == key)
