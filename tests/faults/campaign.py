"""Faults in real runs, a hundred and more: `campaign.py run OUT.jsonl [ROUTER/LAYOUT[/PART] ...]`, then `campaign.py table OUT.jsonl`.

For each router and layout there is a run of two ranks that nobody disturbs. Two more of the same get every fault of FAULTS in turn;
after each that ends it, the same command starts again (as torchrun --max-restarts or a queue does), and the run has to reach its last
step. A fourth starts on four ranks, goes on on two, then on four, and has a poisoned batch. What is checked:

- each fault that ends a run is named: by the rank that is left, or by one error with status 2;
- each start resumes from the newest checkpoint that was complete when the run ended: no committed step is lost;
- metrics.jsonl has every step once, and nothing that has a checkpoint's name is damaged;
- losses, gradient norms, routing statistics and the final checkpoint are bitwise those of the undisturbed run (not of the fourth one).

Parts: `first`, `second` and `worlds`. Runs are kept in OUT.runs/ until all parts of a layout are done. A row for each fault and each
run is appended to OUT.jsonl; `table` makes docs/reliability.md's table of them.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from corpora import write_corpus  # noqa: E402
from launches import Launch  # noqa: E402
from tiny_run import rows, words_for  # noqa: E402

from moe_train.checkpoint import dcp, examine  # noqa: E402

ROUTERS = ("topk", "recurrent")
LAYOUTS = {"dp": [], "ep": ["parallel.ep=2"], "pp": ["parallel.pp=2"]}
FAULTS = {
    "first": ("kill", "kill all", "requeue", "disk full", "nan", "corrupt", "kill", "stop", "requeue"),
    "second": ("kill all", "kill", "corrupt", "nan", "disk full", "kill", "requeue", "kill all", "kill"),
}
WORLDS = (4, 2, 4, 2, 4)
STEPS, EVERY, TIMEOUT = 100, 4, 8
OWN = [
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    f"parallel.timeout_seconds={TIMEOUT}",
    *("train.device=cpu", "train.global_batch_size=4", "train.micro_batch_size=1", "train.seq_len=16", "sample.max_tokens=0"),
    *("eval.every=50", "eval.max_rows=4"),
    *("checkpoint.keep_last=3", "model.router.balance_scope=global_batch", "faults.straggler_factor=null"),
]
NUMBERS = re.compile(r"^step +(\d+)/", re.MULTILINE)
SAME = ("step", "loss", "cross_entropy", "grad_norm", "lr", "layers")


class Failed(Exception):
    """The run did not do what it has to."""


def require(condition: object, *what: object) -> None:
    if not condition:
        raise Failed(" ".join(map(str, what)))


class Run:
    """A run folder and the ranks that work on it."""

    def __init__(self, words: list[str], folder: Path, marker: Path) -> None:
        self.words, self.folder, self.marker = words, folder, marker
        self.ranks: Launch | None = None
        self.size = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, ranks: int, **faults: object) -> None:
        """Start the command, and see from where it goes on."""
        newest = dcp.checkpoints(self.checkpoints)
        self.marker.unlink(missing_ok=True)
        spec = json.dumps(faults | {"once": str(self.marker)})
        self.ranks, self.size = (
            Launch("../tests/faults/inject", spec, *self.words, f"run.dir={self.folder}", ranks=ranks),
            ranks,
        )
        if newest:
            self.wait_for(lambda said: "resumed at step" in said, "to resume")
            require(
                f"resumed at step {dcp.step_of(newest[-1])} from" in self.ranks.stdout, "resumed elsewhere:", self.ranks.stdout
            )

    def wait_for(self, seen: Callable[[str], bool], what: str, seconds: float = 120.0) -> None:
        assert self.ranks is not None
        end = time.monotonic() + seconds
        while not seen(self.ranks.stdout):
            require(
                self.ranks.running, f"ended while it was expected {what}:", self.ranks.stdout[-500:], self.ranks.stderr[-2000:]
            )
            require(time.monotonic() < end, f"was expected {what}:", self.ranks.stdout[-500:], self.ranks.stderr[-2000:])
            time.sleep(0.005)

    def advance(self, steps: int) -> int:
        """Wait until so many steps of this start are done; the last one."""
        self.wait_for(lambda said: len(NUMBERS.findall(said)) >= steps, f"to do {steps} steps")
        return self.step

    @property
    def step(self) -> int:
        assert self.ranks is not None
        return int((NUMBERS.findall(self.ranks.stdout) or ["0"])[-1])

    def end(self) -> None:
        """Kill what is left, as torchrun does when one rank has failed."""
        assert self.ranks is not None
        self.ranks.kill()
        for path in dcp.checkpoints(self.checkpoints):
            require(not list(examine.problems(path)), path, "is damaged")


def kill(run: Run, chance: random.Random) -> str:
    """SIGKILL of one rank; the other one says so."""
    victim = chance.randrange(run.size)
    return lose(run, victim, signal.SIGKILL)


def stop(run: Run, chance: random.Random) -> str:
    """SIGSTOP of one rank; the other one gives up after parallel.timeout_seconds."""
    return lose(run, chance.randrange(run.size), signal.SIGSTOP)


def lose(run: Run, victim: int, number: int) -> str:
    assert run.ranks is not None
    os.kill(run.ranks.processes[victim].pid, number)
    other = 1 - victim
    run.ranks.processes[other].join(TIMEOUT + 60)
    said = run.ranks.read("err", other)
    run.end()
    found = re.search(r"^(?:\S*RankFailure: )(step \d+: .*)$", said, re.MULTILINE)
    require(found, "no RankFailure:", said[-2000:])
    assert found is not None
    named = f"rank {victim} gave no sign" if victim else "the store does not answer: the process that holds it"
    require(named in found[1], "another cause:", found[1])
    return found[1]


def kill_all(run: Run, chance: random.Random) -> str:
    """SIGKILL of all ranks; nobody is left to say anything, and the next start goes on."""
    run.end()
    return "all ranks killed"


def requeue(run: Run, chance: random.Random) -> str:
    """SIGTERM of all ranks, as a queue sends: the run saves the step that it is at, and ends with 0."""
    assert run.ranks is not None
    run.ranks.signal(signal.SIGTERM)
    status = run.ranks.wait()
    require(status == 0, "status", status, run.ranks.stderr[-2000:])
    found = re.search(r"stopped by SIGTERM at step (\d+)", run.ranks.stdout)
    require(found, "did not say so:", run.ranks.stdout[-500:])
    assert found is not None
    newest = dcp.step_of(dcp.checkpoints(run.checkpoints)[-1])
    require(newest == int(found[1]), f"stopped at {found[1]}, saved {newest}")
    return found[0]


def disk_full(run: Run, chance: random.Random) -> str:
    """No room for some checkpoints: a warning for each, and training goes on; with room again, the next one is saved."""
    assert run.ranks is not None
    ballast = run.checkpoints / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    run.wait_for(lambda said: "is not saved:" in said, "to warn of the disk")
    warning = re.search(r"^warning: step (\d+) is not saved: .*No space left on device.*$", run.ranks.stdout, re.MULTILINE)
    require(warning, "another warning:", run.ranks.stdout[-500:])
    assert warning is not None
    ballast.unlink()
    run.wait_for(lambda said: any(dcp.step_of(p) > int(warning[1]) for p in dcp.checkpoints(run.checkpoints)), "to save again")
    return warning[0]


def nan(run: Run, chance: random.Random) -> str:
    """A rank's gradients are NaN once: the step is computed again on all ranks (the start that this comes in injects it)."""
    run.wait_for(lambda said: "the step is computed again" in said, "to meet NaN")
    assert run.ranks is not None
    return re.findall(r"^warning: (.*the step is computed again)$", run.ranks.stdout, re.MULTILINE)[-1]


def corrupt(run: Run, chance: random.Random) -> str:
    """A byte of the newest checkpoint changes: one error that names the file, status 2; without it, the one before is taken."""
    run.wait_for(lambda said: bool(dcp.checkpoints(run.checkpoints)), "to save")
    run.end()
    newest = dcp.checkpoints(run.checkpoints)[-1]
    path = chance.choice(sorted(p for p in newest.iterdir() if p.is_file()))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    refused = Launch("pretrain", *run.words, f"run.dir={run.folder}", ranks=run.size)
    status = refused.wait()
    require(status == 2, f"{path.name} has a wrong bit, status {status}:", refused.stdout[-500:], refused.stderr[-2000:])
    message = next((line for line in refused.stderr.splitlines() if line.startswith("error: ")), "")
    require(newest.name in message, "another error:", refused.stderr[-2000:])
    shutil.rmtree(newest)
    return message


ACTIONS = {
    "kill": kill,
    "kill all": kill_all,
    "requeue": requeue,
    "stop": stop,
    "disk full": disk_full,
    "nan": nan,
    "corrupt": corrupt,
}
GO_ON = ("disk full", "nan")  # the run lives on
GOOD = "reached the last step"


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A disk of its own for checkpoints, so that it can be filled."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def disturb(run: Run, faults: tuple[str, ...], chance: random.Random, note: Callable[..., None]) -> None:
    """One run, a fault after the other, to its end."""
    for i, fault in enumerate(faults):
        if run.ranks is None or not run.ranks.running:
            newest = dcp.checkpoints(run.checkpoints)
            at = (dcp.step_of(newest[-1]) if newest else 0) + chance.randint(3, 5)
            # NaN has to be in the start that it comes in.
            later = faults[i : next((j for j in range(i, len(faults)) if faults[j] not in GO_ON), i) + 1]
            run.start(2, **({"nan": [at, chance.randrange(2), 1]} if "nan" in later else {}))
        begin = time.monotonic()
        step = run.advance(chance.randint(2, EVERY + 1)) if fault != "nan" else run.step
        note(fault=fault, step=step, said=ACTIONS[fault](run, chance), seconds=round(time.monotonic() - begin, 1))
    if not run.ranks or not run.ranks.running:
        run.start(2)
    finish(run)


def finish(run: Run) -> None:
    assert run.ranks is not None
    status = run.ranks.wait(280)
    require(status == 0, "status", status, run.ranks.stderr[-2000:])
    require([row["step"] for row in rows(run.folder)] == list(range(1, STEPS + 1)), "steps are missing or there twice")


def change_worlds(run: Run, note: Callable[..., None]) -> None:
    """Four ranks, two, four ...; in the last of them a poisoned batch."""
    for ranks, after in itertools.pairwise(WORLDS):
        begin = time.monotonic()
        run.start(ranks)
        step = run.advance(EVERY + 2)
        run.end()
        note(fault="world size", step=step, said=f"{ranks} ranks, then {after}", seconds=round(time.monotonic() - begin, 1))
    run.start(WORLDS[-1], poison=STEPS // 2)
    assert run.ranks is not None
    run.wait_for(lambda said: "the step is skipped" in said, "to meet the poisoned batch", 200)
    said = re.findall(r"^warning: (step \d+: .*the step is skipped)", run.ranks.stdout, re.MULTILINE)[0]
    require(said.startswith(f"step {STEPS // 2}: the loss "), "another step was skipped:", said)
    note(fault="poisoned batch", step=STEPS // 2, said=said, seconds=0.0)
    finish(run)


def compare(run: Path, whole: Path) -> None:
    for kind in ("train", "eval"):
        mine, theirs = ([{key: row.get(key) for key in SAME} for row in rows(folder, kind)] for folder in (run, whole))
        require(
            mine == theirs,
            kind,
            "rows differ from",
            next((m["step"] for m, t in zip(mine, theirs, strict=False) if m != t), None),
        )
    lines = [line for line in examine.differences(dcp.find(run), dcp.find(whole)) if not line.startswith("config: run.dir")]
    require(not lines, "final checkpoints differ:", lines[:5])


def campaign(router: str, layout: str, part: str, out: Path) -> None:
    folder = out.with_suffix(".runs") / f"{router}-{layout}"
    words = [w for w in words_for(str(folder / "text")) if router == "recurrent" or "router_size" not in w]
    words += [f"data.{split}={folder / 'held-out'}" for split in ("valid", "test")]
    words += [f"model.router.name={router}", *OWN, *LAYOUTS[layout]]
    whole, run = (Run(words, folder / name, folder / f"{name}.once") for name in ("whole", part))
    shutil.rmtree(run.folder, ignore_errors=True)

    def record(**row: object) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"date": str(date.today()), "router": router, "layout": layout, "part": part, **row}) + "\n")

    begin = time.monotonic()
    try:
        if not dcp.checkpoints(whole.checkpoints) or dcp.step_of(dcp.find(whole.folder)) < STEPS:
            shutil.rmtree(folder, ignore_errors=True)
            write_corpus(folder / "text")
            write_corpus(folder / "held-out", documents=4, seed=1)
            whole.start(2)
            finish(whole)
        if part == "worlds":
            run.words = [*words, "faults.window=16", "faults.loss_spike=skip"]
            change_worlds(run, record)
        else:
            with small_disk(run.checkpoints):
                disturb(run, FAULTS[part], random.Random(f"{router}/{layout}/{part}"), record)
                compare(run.folder, whole.folder)
        record(run="two ranks" if part in FAULTS else "4-2-4 ranks", verdict=GOOD, seconds=round(time.monotonic() - begin, 1))
    except (Failed, TimeoutError) as error:
        record(run="two ranks" if part in FAULTS else "4-2-4 ranks", verdict=f"FAILED: {error}")
        print(f"{router}/{layout}/{part}: {error}", file=sys.stderr)
    finally:
        for started in (whole, run):
            if started.ranks is not None:
                started.ranks.kill()


def table(path: Path) -> str:
    """Markdown: faults by kind and layout, and how the runs ended."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    faults, runs = [row for row in found if "fault" in row], [row for row in found if "run" in row]
    columns = [f"{router}/{layout}" for router in ROUTERS for layout in LAYOUTS]
    lines = ["| fault | " + " | ".join(columns) + " | all |", "|---" * (len(columns) + 2) + "|"]
    for kind in dict.fromkeys(row["fault"] for row in faults):
        counts = [sum(f"{r['router']}/{r['layout']}" == column and r["fault"] == kind for r in faults) for column in columns]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + f" | {sum(counts)} |")
    good = sum(row["verdict"] == GOOD for row in runs)
    lines.append(f"\n{len(faults)} faults in {len(runs)} runs, of which {good} reached their last step.")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    what, out, *names = words
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ranks are ended and disks unmounted on the way
    if what == "table":
        print(table(Path(out)))
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for name in names or [f"{router}/{layout}" for router in ROUTERS for layout in LAYOUTS]:
        router, layout, *parts = name.split("/")
        for part in parts or (*FAULTS, "worlds"):
            campaign(router, layout, part, Path(out))
        if not parts:
            shutil.rmtree(Path(out).with_suffix(".runs") / f"{router}-{layout}")


if __name__ == "__main__":
    main(sys.argv[1:])
