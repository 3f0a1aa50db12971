"""A checkpoint of any layout goes on in any other: the same losses as without the interruption, and moments equal to the last bit."""

from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from layouts import tiny
from ranks import run_ranks
from torch.distributed.tensor import DTensor

from moe_train import verify
from moe_train.checkpoint import dcp
from moe_train.checkpoint.logical import logical_tensors
from moe_train.cli import merge, parse
from moe_train.engine.native import NativeEngine
from moe_train.parallel.mesh import start_world
from moe_train.pretraining import data_loader, settle_vocabulary

LAYOUTS = {
    "one": "",
    "dp4": "dp_shard=4",
    "ep4": "ep=4",
    "tp2_ep2": "tp=2,ep=2",
    "pp2_dp2": "pp=2,dp_shard=2",
    "cp2_tp2": "cp=2,tp=2",
}
SAVED, STEPS = 2, 5
LIMIT = 2e-6  # of relative differences of losses
# The balance loss uses the fractions of the step before: a buffer that must come back, too.
RUN = tiny({"name": "recurrent", "router_size": 8, "balance_scope": "global_batch"}, {"train": {"steps": STEPS}})


class Run:
    """A run of RUN under a layout, on these ranks."""

    def __init__(self, layout: str, prefix: str) -> None:
        content = merge(RUN, {"data": {"train": prefix, "valid": prefix, "test": prefix, "tokenizer": "bytes"}})
        config = verify.lay_out(parse(content, "run"), LAYOUTS[layout]).config
        world = start_world(config)
        config, tokenizer = settle_vocabulary(config)
        self.engine, self.loader = NativeEngine(config, world), data_loader(config, world, tokenizer)

    def steps(self, count: int) -> list[float]:
        """Losses of the next steps."""
        losses = []
        for _ in range(count):
            losses.append(self.engine.forward_backward(self.loader.next_step()).loss)
            self.engine.step()
        return losses


def save(layout: str, prefix: str, folder: Path) -> list[float]:
    """Save under a layout, and go on without an interruption: the losses after it."""
    run = Run(layout, prefix)
    run.steps(SAVED)
    state = {"loader": run.loader.state_dict()}
    dcp.save(folder / layout, SAVED, run.engine.state_dict(), state, {}, run.engine.logical_state())
    return run.steps(STEPS - SAVED)


def resume(layout: str, prefix: str, saved: Path) -> tuple[list[float], list[str], set[str]]:
    """Go on under another layout: losses, tensors that are not what was saved, and the names of all on this rank."""
    run = Run(layout, prefix)
    state = run.engine.state_dict()
    manifest = dcp.load(saved / f"step-{SAVED:08d}", state)
    run.loader.load_state_dict(manifest["loader"])
    run.engine.load_state_dict(state)
    run.engine.steps_done = SAVED
    wrong, names = [], set()
    for section, tensors in run.engine.state_dict().items():
        there = {tensor.name: tensor for tensor in logical_tensors(saved / f"step-{SAVED:08d}", section)}
        for name, value in tensors.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            names.add(f"{section}.{name}")
            if not torch.equal(whole, there[name].load()):
                wrong.append(f"{section}.{name}")
    return run.steps(STEPS - SAVED), wrong, names


def work(sources: list[str], pairs: list[tuple[str, str]], prefix: str, folder: Path) -> tuple[dict, dict]:
    """Save under each source; then go on from the first of each pair under the second."""
    saved = {source: save(source, prefix, folder) for source in sources}
    return saved, {(source, target): resume(target, prefix, folder / source) for source, target in pairs}


def check(sources: list[str], pairs: list[tuple[str, str]], folder: Path) -> None:
    """Save under each source and go on as the pairs (source, target) say."""
    prefix = write_corpus(folder / "text")
    alone, others = ([s for s in sources if (s == "one") == one] for one in (True, False))
    to_one, to_others = ([pair for pair in pairs if (pair[1] == "one") == one] for one in (True, False))
    calls = [(1, alone, []), (4, others, to_others), (1, [], to_one)]
    results = [run_ranks(ranks, work, *call, prefix, folder, timeout=1800) for ranks, *call in calls if any(call)]
    expected = {source: losses for ranks in results for source, losses in ranks[0][0].items()}
    for ranks in results:
        for pair in ranks[0][1]:
            found = [resumed[pair] for _, resumed in ranks]
            path = folder / pair[0] / f"step-{SAVED:08d}"
            there = {f"{part}.{tensor.name}" for part in ("model", "optimizer") for tensor in logical_tensors(path, part)}
            assert set().union(*(names for _, _, names in found)) == there
            assert not [name for _, wrong, _ in found for name in wrong], pair
            assert [losses for losses, _, _ in found] == [pytest.approx(expected[pair[0]], rel=LIMIT, abs=0.0)] * len(found), (
                pair
            )


def test_some_pairs(tmp_path: Path) -> None:
    check(["ep4"], [("ep4", "pp2_dp2"), ("ep4", "one")], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_layout_to_every_other(tmp_path: Path) -> None:
    check([*LAYOUTS], [(source, target) for source in LAYOUTS for target in LAYOUTS if source != target], tmp_path)
