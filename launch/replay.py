"""Compute a step again that a run has kept: `python launch/replay.py runs/mine/faults/step-00000013 [section.key=value ...]`.

Says where the first value that is not finite comes about, in which micro-batch, and which parameters' gradients it reaches; of a
spike, which rows have the highest loss. One process, with the weights that the run had before the step. Where everything is finite
here, the fault was not in batch and weights.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.cli import main

if TYPE_CHECKING:
    from moe_train.faults.replay import Replay

SHOWN = 8


def run(words: list[str]) -> None:
    """Compute and print."""
    parser = ArgumentParser("launch/replay.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_args(words)

    from moe_train.faults.replay import replay

    show(replay(given.bundle, given.overrides))


def show(found: "Replay") -> None:
    """Print what came out."""
    facts = found.bundle.facts
    print(f"step {found.bundle.step} of {facts['world_size']} rank(s), {facts['dtype']} on {facts['device']}: {facts['text']}")
    print(f"loss then {facts['loss']}, now {found.loss}")
    if found.weights:
        print(f"infinite or not a number in the weights: {_list(found.weights)}")
    for outcome in found.outcomes:
        print(f"micro-batch {outcome.number} (rank {outcome.rank}): loss {outcome.loss:.6g}, ", end="")
        print(f"highest in row {outcome.worst_row} with {outcome.worst_nats:.4g} nats a token")
        if outcome.first is not None:
            print(f"    first {outcome.first}")
        if outcome.gradients:
            print(f"    gradients: {_list(outcome.gradients)}")
    if found.finite and facts["cause"] == "nonfinite":
        print(
            "everything is finite here: the fault was not in the batch and the weights, but in a device, its memory or a link"
        )


def _list(names: list[str]) -> str:
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


if __name__ == "__main__":
    main(run, sys.argv[1:])
