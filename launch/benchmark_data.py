"""Measure how fast data is prepared and loaded: `python launch/benchmark_data.py prepare|loader ... [--output FILE]`.

`prepare [--tokenizer bytes|FILE] [--megabytes N] [--workers N] [--document-bytes N]`: text per second, and with a SentencePiece model
in pairs with a bare loop over its own encode. `loader CONFIG.yaml [section.key=value ...] [--steps N]`: the loader of a run with
data.train beside the run's training. With --output a row with hardware and versions is appended to a file of JSON lines.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import load_run, main
from moe_train.errors import UserError


def run(words: list[str]) -> None:
    """Measure as `words` say."""
    given = read(words)

    from moe_train import benchmark, benchmark_data

    if given.what == "prepare":
        row = benchmark_data.measure_prepare(given.tokenizer, given.megabytes, given.workers, given.document_bytes)
        rate = f"{row['megabytes_per_second_per_worker']:.1f} MB/s a worker, {row['megabytes_per_second']:.1f} MB/s together"
        share = ""
        if "share_of_bare" in row:
            spread = f"{row['share_of_bare_least']:.0%} to {row['share_of_bare_most']:.0%} in {row['pairs']} pairs"
            share = f", {row['share_of_bare']:.0%} of a bare loop ({spread})"
        print(f"{row['tokenizer']}: {rate}{share} ({row['device']})")
    else:
        config = load_run(given.config, given.overrides)
        if config.data.train is None:
            raise UserError("data.train=null: the loader is measured on a corpus; give the prefix of one")
        row = benchmark_data.measure_loader(config, given.steps)
        print(f"loader: {row['tokens_per_second']:.0f} tokens/s, {row['times_training']:.0f} times training ({row['device']})")
    if given.output is not None:
        benchmark.append(row, given.output)


def read(words: list[str]) -> Namespace:
    """The command line."""
    parser = ArgumentParser("launch/benchmark_data.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    prepare = kinds.add_parser("prepare")
    prepare.add_argument("--tokenizer", metavar="bytes|FILE", default="bytes")
    prepare.add_argument("--megabytes", type=float, default=20, help="of text (default: 20)")
    prepare.add_argument("--workers", type=int, default=1, help="processes (default: 1); each wants 32 MB of text")
    prepare.add_argument("--document-bytes", type=int, help="cut longer documents (default: files of the corpus as they are)")
    loader = kinds.add_parser("loader")
    loader.add_argument("config", type=Path)
    loader.add_argument("overrides", nargs="*", help="section.key=value")
    loader.add_argument("--steps", type=int, default=5, help="timed training steps; the loader makes ten times as many")
    for kind in (prepare, loader):
        kind.add_argument("--output", type=Path, help="append a row to this file")
    given = parser.parse_args(words)
    names = ("workers", "steps", "megabytes", "document_bytes")
    if min(value for name in names if (value := getattr(given, name, None)) is not None) <= 0:
        parser.error("--workers, --steps, --megabytes and --document-bytes must be positive")
    return given


if __name__ == "__main__":
    main(run, sys.argv[1:])
