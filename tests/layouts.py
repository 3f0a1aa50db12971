"""Tiny runs under layouts on real ranks, and what tells them from one process."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from corpora import write_corpus
from ranks import run_ranks

from moe_train import verify
from moe_train.cli import merge, parse

Content = dict[str, Any]
Prepare = Callable[[], Any] | None  # what ranks do first: register a router, plant a bug
BASE: Content = {
    "model": {
        "hidden_size": 16,
        "num_layers": 4,
        "num_heads": 4,
        "num_experts": 4,
        "ffn_hidden_size": 8,
        "vocab_size": 320,
        "init_std": 0.1,  # so narrow a model is nearly linear with the usual 0.02, and much of it would go unseen
    },
    "train": {
        "steps": verify.STEPS,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seq_len": 64,
        "device": "cpu",
        "dtype": "fp32",
    },
    "optim": {"warmup_steps": 0, "lr": 1e-2, "eps": verify.EPS},
}
FP64: Content = {"train": {"dtype": "fp64"}, "kernels": {"backend": "reference"}}


def tiny(router: Content, *changes: Content) -> Content:
    """A run without data, small enough for many of them."""
    content = merge(BASE, {"model": {"router": router}})
    for change in changes:
        content = merge(content, change)
    return content


class Case(NamedTuple):
    """A run and the layout that must not change it."""

    layout: str
    run: Content

    @property
    def dtype(self) -> str:
        return str(self.run["train"]["dtype"])

    def __str__(self) -> str:
        return f"{self.layout}: {self.run['model']['router']} {self.dtype}"


class Bench:
    """A corpus, and what one process computes for the runs that were tried until now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = write_corpus(folder / "corpus")

    def wrong(self, size: int, cases: list[Case], prepare: Prepare = None, bug: Prepare = None) -> dict[str, list[str]]:
        """What is wrong with cases on `size` ranks: differences that are too large, or tracebacks. `bug` is for the ranks only."""
        steps = [step for step in (prepare, bug) if step is not None]
        wrong = {}
        for case, path in zip(cases, self._references([case.run for case in cases], prepare), strict=True):
            try:  # new ranks for each, since those that failed are out of step
                arguments = (case.layout, self._with_data(case.run), path, steps)
                ranks = run_ranks(size, _compare, *arguments, timeout=1200, patience=600)  # compilation takes minutes
                wrong[str(case)] = verify.judge(verify.combine(ranks, path), case.dtype).failures
            except RuntimeError as error:
                wrong[str(case)] = [str(error)]
        return {case: failures for case, failures in wrong.items() if failures}

    def _with_data(self, run: Content) -> Content:
        return merge(run, {"data": {"train": self.prefix, "valid": self.prefix, "test": self.prefix}})

    def _references(self, runs: list[Content], prepare: Prepare) -> list[Path]:
        """The file of what one process computes for each run."""
        paths = [self.folder / f"{hashlib.sha256(json.dumps(run).encode()).hexdigest()}.pt" for run in runs]
        new = {path: self._with_data(run) for path, run in zip(paths, runs, strict=True) if not path.exists()}
        if new:
            run_ranks(1, _record, new, prepare, timeout=3600)
        return paths


def _record(runs: dict[Path, Content], prepare: Prepare) -> None:
    if prepare is not None:
        prepare()
    for path, run in runs.items():
        verify.record(parse(run, path.name), path)


def _compare(layout: str, run: Content, path: Path, prepare: list[Callable[[], Any]]) -> verify.Found:
    for step in prepare:
        step()
    return verify.compare(verify.lay_out(parse(run, layout), layout).config, path)
