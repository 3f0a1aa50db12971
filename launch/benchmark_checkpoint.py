"""Measure checkpoints: `torchrun launch/benchmark_checkpoint.py CONFIG.yaml [section.key=value ...] --folder DIR [--output FILE]`.

Prints how fast the run's state is saved and loaded beside a plain write and read of as many bytes on the same disk, and how long
training stands still for a save in the background, in seconds and in steps. configs/benchmark_checkpoint.yaml is a model of 2 GB. With
--output it appends a row with hardware and versions to a file of JSON lines.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import load_run, main


def run(words: list[str]) -> None:
    """Measure as `words` say."""
    parser = ArgumentParser("launch/benchmark_checkpoint.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is meant; must not hold checkpoints")
    parser.add_argument("--repeats", type=int, default=3, help="turns of saving, writing, loading and reading")
    parser.add_argument("--steps", type=int, default=5, help="steps whose median is the usual one")
    parser.add_argument("--output", type=Path, help="append a row to this file")
    given = parser.parse_intermixed_args(words)
    if given.repeats < 1 or given.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    if given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder} is not empty, and what is in it would be deleted")
    config = load_run(given.config, given.overrides)

    from moe_train import benchmark, benchmark_checkpoint

    row = benchmark_checkpoint.measure(config, given.folder, given.repeats, given.steps)
    row |= {"config": str(given.config), "overrides": given.overrides}
    if os.environ.get("RANK", "0") == "0":
        benchmark_checkpoint.describe(row)
        if given.output is not None:
            benchmark.append(row, given.output)


if __name__ == "__main__":
    main(run, sys.argv[1:])
