"""Is this machine fit for a run? `python launch/doctor.py [CONFIG.yaml] [section.key=value ...]`, or the same under torchrun.

Checks versions, devices, the speed of each rank's device, all-reduce bandwidth, clocks, the disk of run.dir and, with a CONFIG, its
keys and layout, the room for its checkpoints, its tokenizer and its datasets. A line for each; the exit status is 1 where one fails.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.cli import main


def run(words: list[str]) -> None:
    """Check and print."""
    parser = ArgumentParser("launch/doctor.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml or section.key=value")
    parser.add_argument("--all-data", action="store_true", help="read every token of the datasets instead of samples")
    given = parser.parse_args(words)
    files = [word for word in given.words if "=" not in word]
    overrides = [word for word in given.words if "=" in word]
    if len(files) > 1 or (overrides and not files):
        parser.error("one CONFIG.yaml at most, and overrides of one only")

    from moe_train.doctor import examine

    failed = 0
    for check in examine(Path(files[0]) if files else None, overrides, given.all_data):
        failed += not check.good
        if os.environ.get("RANK", "0") == "0":
            print(f"{'ok  ' if check.good else 'FAIL'}  {check.name}: {check.found}", flush=True)
            if not check.good:
                print(f"      remedy: {check.remedy}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(run, sys.argv[1:])
