"""A run that blends two datasets, through the real command: shares, cursors, and a resume with other shares."""

from pathlib import Path

from corpora import write_corpus
from launches import launch
from tiny_run import rows, words_for

from moe_train.checkpoint.manifest import read_manifest


def places(run: Path, step: int) -> dict[int, tuple[float, int, int]]:
    """Of each source: weight, rows taken since the start of the run, and those with the weights of now."""
    saved = read_manifest(run / "checkpoints" / f"step-{step:08d}")["loader"]
    return {source["number"]: (source["weight"], source["cursor"], source["taken"]) for source in saved["sources"]}


def test_a_blend_keeps_its_shares_and_its_place_when_they_change(tmp_path: Path) -> None:
    """8 rows a step: 4 steps at 3 to 1, then 2 at 1 to 3."""
    one, two = (write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    run = tmp_path / "run"
    words = [*words_for(one), f"data.train=[{one},{two}]", f"run.dir={run}", "eval.every=0", "sample.max_tokens=0"]
    done = launch("pretrain", *words, "data.weights=[3,1]", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert places(run, 4) == {0: (3.0, 24, 24), 1: (1.0, 8, 8)}
    before = rows(run)
    done = launch("pretrain", *words, "data.weights=[1,3]")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout
    assert places(run, 6) == {0: (1.0, 24 + 4, 4), 1: (3.0, 8 + 12, 12)}
    assert rows(run)[:4] == before
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    refused = launch("pretrain", *words, "train.steps=7")
    assert refused.returncode == 2
    assert "saved with a blend of sources; give data.weights" in refused.stderr
