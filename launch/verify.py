"""Show that layouts change nothing: `python launch/verify.py CONFIG.yaml [LAYOUT ...] [section.key=value ...]`.

Trains three steps in one process and under each layout, on ranks started here (CPU, gloo), and prints the largest relative
differences of losses, gradients and weights, and of tokens per expert the largest number that went elsewhere. A layout is keys of
`parallel` with commas between, such as `tp=2,ep=2` or `pp=2,pp_schedule=zbv`; without any, the config's own and usual ones, as far as
there is a core for each rank. The exit status is 1 where a layout fails. Make a large model small by words: model.num_layers=4 ...
"""

import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.cli import load_run, main
from moe_train.errors import UserError

if TYPE_CHECKING:
    from moe_train.verify import Trial


def run(words: list[str]) -> None:
    """Compare what `words` name and print a table."""
    parser = ArgumentParser("launch/verify.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("words", nargs="*", metavar="LAYOUT or section.key=value")
    given = parser.parse_args(words)
    overrides = [word for word in given.words if "." in word.partition("=")[0]]
    named = [word for word in given.words if word not in overrides]
    config = load_run(given.config, overrides)

    from moe_train import verify

    config = verify.prepare(config)
    trials = [verify.lay_out(config, layout) for layout in named] or _possible(verify.usual(config, os.cpu_count() or 1))
    limits = verify.LIMITS[config.train.dtype]
    print(f"{min(verify.STEPS, config.train.steps)} steps of {given.config} in {config.train.dtype}, beside one process")
    print(f"{'layout':34}{'ranks':>5}" + "".join(f"{kind:>12}" for kind in limits))
    print(f"{'at most':39}" + "".join(f"{limit:12.1e}" for limit in limits.values()), flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for trial, verdict in verify.verify(config, trials, Path(folder)):
            figures = "".join(f"{value:12.1e}" for value, _ in verdict.worst.values())
            print(f"{trial.layout:34}{trial.ranks:5}{figures}  {'FAIL' if verdict.failures else 'PASS'}", flush=True)
            for failure in verdict.failures[:5]:
                print(f"    {failure}", flush=True)
            failed = failed or bool(verdict.failures)
    sys.exit(1 if failed else 0)


def _possible(usual: "list[Trial | UserError]") -> "list[Trial]":
    """Those that can be tried; of the others it is said why not."""
    for refused in (str(trial) for trial in usual if isinstance(trial, UserError)):
        print("not tried: " + " ".join(line.strip() for line in refused.splitlines()))
    return [trial for trial in usual if not isinstance(trial, UserError)]


if __name__ == "__main__":
    main(run, sys.argv[1:])
