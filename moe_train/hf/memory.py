"""How much memory a conversion takes, beyond what the process held before."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.errors import UserError

STATUS = Path("/proc/self/status")
KINDS = {"RssAnon": "anonymous_bytes", "RssFile": "mapped_bytes"}
SECONDS = 0.01  # between looks


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """What the block adds at most, in bytes, once it has ended: `anonymous_bytes`, and `mapped_bytes` of files, whose pages the
    system takes back when it needs them. Raises UserError where the system is not Linux."""
    if not STATUS.exists():
        raise UserError(f"{STATUS}: is not there, and memory is measured on Linux only; leave --memory out")
    before, peak, done = _held(), dict.fromkeys(KINDS.values(), 0), threading.Event()

    def look() -> None:
        while not done.wait(SECONDS):
            now = _held()
            peak.update({kind: max(peak[kind], now[kind] - before[kind]) for kind in peak})

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _held() -> dict[str, int]:
    """Bytes by kind."""
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    return {KINDS[key]: int(value.split()[0]) * 1024 for key, _, value in lines if key in KINDS}
