"""Measure a run's speed: `torchrun launch/benchmark.py CONFIG.yaml [section.key=value ...] [--steps N] [--warmup N] [--output FILE]`.

Without data.train it takes random tokens. Prints tokens per second with their spread, the time by part, peak memory and MFU, and with
--output appends a row with hardware and versions to a file of JSON lines.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import load_run, main


def run(words: list[str]) -> None:
    """Measure as `words` say."""
    parser = ArgumentParser("launch/benchmark.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append a row to this file")
    given = parser.parse_intermixed_args(words)
    if given.steps < 1 or given.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")

    from moe_train import benchmark
    from moe_train.parallel.mesh import start_world
    from moe_train.train import data_loader, settle_vocabulary

    config = load_run(given.config, given.overrides)
    world = start_world(config)
    config, tokenizer = settle_vocabulary(config)
    loader = data_loader(config, world, tokenizer) if config.data.train else benchmark.RandomRows(config, world)
    row = {"config": str(given.config), "overrides": given.overrides, "data": config.data.train or "random"}
    row |= benchmark.measure(config, world, loader, given.steps, given.warmup)
    if world.main:
        benchmark.describe(row)
        if given.output is not None:
            benchmark.append(row, given.output)


if __name__ == "__main__":
    main(run, sys.argv[1:])
