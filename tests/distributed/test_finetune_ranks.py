"""Fine-tuning gives the same numbers under every layout: losses of steps, held-out losses, which class each text is taken for."""

import random
from pathlib import Path
from typing import Any

import pytest
from finetuning import chats, write_examples
from ranks import run_ranks

from moe_train.cli import parse

MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "ffn_hidden_size": 32}
LAYOUTS = [{"dp_shard": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2, "sharding": "parameters"}, {"pp": 2, "tp": 2}]


def content(folder: Path, task: str) -> dict[str, Any]:
    """A run of one of the two tasks, without a checkpoint: its weights are those of the seed."""
    sft: dict[str, Any] = {"task": task, "epochs": 1}
    if task == "classification":
        rng = random.Random(0)
        for split, count in (("train", 90), ("valid", 25)):
            rows = "".join(f"{''.join(rng.choices('xyz', k=rng.randint(3, 20)))}\t{rng.randint(0, 3)}\n" for _ in range(count))
            (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
            sft[split] = str(folder / f"{split}.tsv")
    else:
        sft |= {
            split: write_examples(folder / f"{split}.json", chats(count)) for split, count in (("train", 90), ("valid", 25))
        }
    return {
        "model": {**MODEL, "router": {"name": "recurrent", "router_size": 8}},
        "sft": sft,
        "train": {"seq_len": 64, "global_batch_size": 8, "micro_batch_size": 2, "device": "cpu", "dtype": "fp64"},
        "kernels": {"backend": "torch"},
        "optim": {"lr": 1e-2, "eps": 1e-3, "warmup_steps": 1},
        "data": {"tokenizer": "bytes"},
        "sample": {"max_tokens": 0},
    }


def figures(content: dict[str, Any]) -> list[Any]:
    """The first steps' losses and what a held-out evaluation then says, as every rank reports them."""
    from moe_train.engine.native import NativeEngine
    from moe_train.finetune.task import fine_tuning
    from moe_train.parallel.mesh import start_world
    from moe_train.pretraining import settle_vocabulary

    config = parse(content, "test")
    world = start_world(config)
    config, tokenizer = settle_vocabulary(config)
    config, feed = fine_tuning(config, world, tokenizer)
    engine, found = NativeEngine(config, world), []
    for _ in range(3):
        found.append(engine.forward_backward(feed.batches.next_step()).loss)
        engine.step()
    assert feed.validation is not None
    report = feed.judge(engine, feed.validation)
    return [*found, report.pop("loss"), report.pop("perplexity", 0.0), report]


def compare(task: str, layouts: list[dict[str, Any]], folder: Path) -> None:
    one = content(folder, task)
    [*numbers, rest] = run_ranks(1, figures, one)[0]
    assert len(set(numbers[:3])) == 3  # steps change the model
    for layout in layouts:
        size = 4 if len({"tp", "pp"} & layout.keys()) == 2 else 2
        for [*there, others] in run_ranks(size, figures, {**one, "parallel": layout}):
            assert there == pytest.approx(numbers, rel=1e-10), layout
            assert _rounded(others) == _rounded(rest), layout


def _rounded(report: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 10) if isinstance(value, float) else value for name, value in report.items()}


def test_two_data_parallel_ranks_compute_what_one_does(tmp_path: Path) -> None:
    compare("classification", LAYOUTS[:1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["instructions", "classification"])
def test_every_axis_computes_what_one_process_does(task: str, tmp_path: Path) -> None:
    compare(task, LAYOUTS, tmp_path)
