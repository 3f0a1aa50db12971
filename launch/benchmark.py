"""Measure a run's speed: `torchrun launch/benchmark.py CONFIG.yaml [section.key=value ...] [--steps N] [--warmup N] [--output FILE]`.

Without data.train it takes random tokens. Prints tokens per second with their spread, the time by part, peak memory and MFU, and with
--output appends rows with hardware and versions to a file of JSON lines. With --rival or --against it compares the run with others:
each trains in a process of its own, and they take turns of one optimizer step.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import load_run, main


def run(words: list[str]) -> None:
    """Measure as `words` say."""
    given = read(words)
    config = load_run(given.config, given.overrides)

    from moe_train import benchmark, versus

    sides = [versus.Side("ours", given.config, given.overrides)]
    if given.rival:
        sides.append(versus.Side(given.rival, given.config, given.overrides, given.rival))
    for more in given.against:
        load_run(given.config, given.overrides + more)  # a mistake is said before anything starts
        sides.append(versus.Side(" ".join(more), given.config, given.overrides + more))
    if len(sides) > 1:
        rows = versus.compare(sides, given.steps, given.warmup)
    else:
        named = {"side": "ours", "config": str(given.config), "overrides": given.overrides}
        rows = [named | benchmark.measure(config, given.steps, given.warmup)]
    if os.environ.get("RANK", "0") != "0":
        return
    for row in rows:
        if len(rows) > 1:
            print(f"{row['side']}:")
        benchmark.describe(row)
    for row in rows[1:]:
        print(versus.describe(row))
    if given.output is not None:
        for row in rows:
            benchmark.append(row, given.output)


def read(words: list[str]) -> Namespace:
    """The command line."""
    parser = ArgumentParser("launch/benchmark.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (of each side)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--output", type=Path, help="append a row for each side to this file")
    parser.add_argument("--rival", choices=["hf"], help="compare with Hugging Face transformers' Mixtral of the same shape")
    parser.add_argument(
        "--against", nargs="+", action="append", default=[], metavar="section.key=value", help="compare with these overrides"
    )
    given = parser.parse_intermixed_args(words)
    if given.steps < 1 or given.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    return given


if __name__ == "__main__":
    main(run, sys.argv[1:])
