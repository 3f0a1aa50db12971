"""Look at checkpoints: `python launch/checkpoint.py list|verify|diff PATH...`, without a model and in one process.

A PATH is a checkpoint (`runs/mine/checkpoints/step-00000100`) or a run folder.

list PATH...     steps and sizes, and whether every file is there and as long as it was
verify PATH...   reads every byte: checksums, and whether the shards cover every tensor once; status 1 where something is wrong
diff ONE TWO     steps, config keys and tensors that differ, with the largest difference of each (of a run folder, its newest
                 checkpoint); status 1 where something does
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path

from moe_train.cli import main
from moe_train.errors import UserError


def run(words: list[str]) -> None:
    """What `words` ask for."""
    parser = ArgumentParser("launch/checkpoint.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["list", "verify", "diff"])
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH")
    given = parser.parse_args(words)
    if given.what == "diff" and len(given.paths) != 2:
        raise UserError(f"launch/checkpoint.py diff: {len(given.paths)} path(s); it compares two checkpoints")
    wrong = {"list": show, "verify": verify, "diff": compare}[given.what](given.paths)
    sys.exit(1 if wrong else 0)


def show(paths: list[Path]) -> bool:
    """Print a line for each checkpoint, and for what unfinished saves have left."""
    from moe_train.checkpoint import dcp, examine

    for path in paths:
        found = examine.found_in(path)
        for checkpoint in found:
            state = next(examine.problems(checkpoint, content=False), "complete")
            print(f"{checkpoint}  {examine.size_of(checkpoint) / 1e6:.1f} MB  {state}")
        for left in sorted(found[0].parent.glob(f"{dcp.TEMPORARY}*")):
            print(f"{left}  {examine.size_of(left) / 1e6:.1f} MB  not complete: a save or a deletion that is not finished")
    return False


def verify(paths: list[Path]) -> bool:
    """Print what is wrong with each checkpoint; whether anything is."""
    from moe_train.checkpoint import examine

    failed = False
    for checkpoint in (checkpoint for path in paths for checkpoint in examine.found_in(path)):
        wrong = _print(examine.problems(checkpoint))
        print(f"{checkpoint}: {f'{wrong} problem(s)' if wrong else 'sound'}", flush=True)
        failed = failed or wrong > 0
    return failed


def compare(paths: list[Path]) -> bool:
    """Print what differs between two checkpoints; whether anything does."""
    from moe_train.checkpoint import dcp, examine

    one, two = map(dcp.find, paths)
    count = _print(examine.differences(one, two))
    print(f"{one} and {two}: {f'{count} difference(s)' if count else 'the same'}")
    return count > 0


def _print(lines: Iterable[str]) -> int:
    """Print lines as they come; how many."""
    count = 0
    for line in lines:
        print(line, flush=True)
        count += 1
    return count


if __name__ == "__main__":
    main(run, sys.argv[1:])
