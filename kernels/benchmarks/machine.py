"""The machine under test: its name and versions, its measured ceilings, and its clock and power while something runs."""

import os
import platform
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

Window = tuple[float, float]  # monotonic seconds: start and end of a stretch of measurements


class Ceilings(NamedTuple):
    """What this chip does at best in this run; all shares are of these figures, not of a datasheet's."""

    matmul_tflops: float  # a large square product of random values
    copy_gbs: float  # a large device-to-device copy, bytes read plus bytes written


def describe(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """The row fields that are the same for a whole run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or own_commit(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "driver": (_smi("driver_version") or "unknown") if device.type == "cuda" else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": installed_version("triton") or "none",
        "python": platform.python_version(),
    }


def own_commit() -> str:
    """The commit of the source tree this file stands in, with `-dirty` where tracked files differ from it; or 'unknown'."""
    here = Path(__file__).parent
    head = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    if not head:
        return "unknown"
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return head + "-dirty" if changed else head


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, if it is one."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu_index() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def _smi(field: str) -> str:
    return _output(["nvidia-smi", "-i", _gpu_index(), f"--query-gpu={field}", "--format=csv,noheader"])


class Monitor:
    """Samples the SM clock (MHz) and the power draw (W) while it is entered. Without an answering nvidia-smi it has no samples."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        self._enabled = device.type == "cuda"

    def __enter__(self) -> "Monitor":
        query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
        if self._enabled:
            try:
                self._process = subprocess.Popen(
                    ["nvidia-smi", "-i", _gpu_index(), *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                threading.Thread(target=self._read, daemon=True).start()
            except OSError:
                self._process = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                clock, power = (float(part) for part in line.split(","))
            except ValueError:  # "[N/A]"
                continue
            self._samples.append((time.monotonic(), clock, power))

    def during(self, windows: Sequence[Window]) -> tuple[float | None, float | None]:
        """Median clock and power of the samples taken in any of the windows."""
        found = [sample for sample in list(self._samples) if any(start <= sample[0] <= end for start, end in windows)]
        if not found:
            return None, None
        return median(sample[1] for sample in found), median(sample[2] for sample in found)
