"""Bits per byte of a trained model: `python launch/evaluate.py RUN_OR_CHECKPOINT --data PREFIX_OR_FILE [section.key=value ...]`.

PREFIX is a prepared corpus (PREFIX.bin, PREFIX.idx); FILE is a text file, which is encoded first.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import main


def run(words: list[str]) -> None:
    """Evaluate as `words` say; rank 0 prints one JSON object."""
    parser = ArgumentParser("launch/evaluate.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", required=True, help="prefix of a prepared corpus, or a text file")
    parser.add_argument(
        "--memory",
        type=int,
        default=0,
        help="hidden rows of each layer that a row sees of the rows before (block transformer_xl)",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_intermixed_args(words)
    if given.memory < 0:
        parser.error("--memory must not be negative")

    from moe_train.evaluate import evaluate_on, restore

    restored = restore(given.model, given.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        figures = evaluate_on(restored, given.data, Path(scratch), given.memory)
    if restored.world.main:
        print(json.dumps({"checkpoint": str(restored.path), "step": restored.step, "data": given.data, **figures}))


if __name__ == "__main__":
    main(run, sys.argv[1:])
