"""Train the quickstart's model with every router, then measure their steps in turns: python docs/router_runs.py FOLDER > TABLE.

One seed, few steps: it shows that each router trains, not which is better. Runs that FOLDER has already are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_train import routers
from moe_train.metrics import read_rows

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
STEPS = 300
OVERRIDES = ["train.global_batch_size=4", "train.micro_batch_size=4", "optim.lr=1e-3", f"train.steps={STEPS}", "eval.every=100"]
HEAD = """| router | loss, step 20 | step 300 | valid, bits per byte: step 100 | 300 | fullest expert / mean | dead | entropy | step time / topk |
|---|---|---|---|---|---|---|---|---|"""


def main(folder: Path) -> None:
    """Do what is missing and print the table."""
    names = ["topk", *sorted(set(routers.registry()) - {"topk"})]
    for name in names:
        if not (folder / name / "sample.txt").exists():  # the last file of a run
            launch("pretrain.py", f"run.dir={folder / name}", f"model.router.name={name}")
    timed = folder / "steps.jsonl"
    if not timed.exists():
        others = [word for name in names[1:] for word in ("--against", f"model.router.name={name}")]
        launch("benchmark.py", "model.router.name=topk", *others, "--steps", "20", "--output", str(timed))
    speeds = {row["router"]: row for row in map(json.loads, timed.read_text().splitlines())}
    print(HEAD)
    for name in names:
        print(table_row(name, read_rows(folder / name), speeds[name]))


def launch(script: str, *words: str) -> None:
    """Run one of launch/'s commands on the quickstart; what it prints goes to stderr."""
    command = [sys.executable, f"launch/{script}", CONFIG, *OVERRIDES, *words]
    subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)


def table_row(name: str, rows: list[dict[str, Any]], speed: dict[str, Any]) -> str:
    """A router's line of the table."""
    train = {row["step"]: row for row in rows if row["kind"] == "train"}
    valid = {row["step"]: row["bits_per_byte"] for row in rows if row["kind"] == "eval" and row["split"] == "valid"}
    last = train[STEPS]
    cells = [
        name,
        f"{train[20]['cross_entropy']:.3f}",
        f"{last['cross_entropy']:.3f}",
        f"{valid[100]:.3f}",
        f"{valid[STEPS]:.3f}",
        f"{last['load_max_mean']:.2f}",
        f"{last['dead_experts']}",
        f"{last['entropy_min']:.2f}",
        f"{1 / speed['ratio'] if 'ratio' in speed else 1:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
