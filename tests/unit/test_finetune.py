"""Fine-tuning from a checkpoint: what it learns, what stays frozen, going on, classifiers, and what is refused."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from corpora import write_corpus
from finetuning import chats, write_examples
from launches import launch
from tiny_run import rows

from moe_train.checkpoint.logical import logical_tensors
from moe_train.cli import load_run, parse
from moe_train.config import Config
from moe_train.data.characters import CharacterTokenizer
from moe_train.errors import UserError
from moe_train.evaluate import restore
from moe_train.finetune.task import finetune, on_checkpoint
from moe_train.hf.native import open_native
from moe_train.train import train

MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "ffn_hidden_size": 32}
RECURRENT = {"name": "recurrent", "router_size": 8}
DISCRETE = {"name": "vqmoe", "branches": "discrete"}
QUICK = {
    "train": {"seq_len": 96, "global_batch_size": 8, "micro_batch_size": 4, "log_every": 1, "device": "cpu"},
    "optim": {"lr": 1e-2, "min_lr": 0.0, "warmup_ratio": 0.1, "weight_decay": 0.0},
    "sample": {"max_tokens": 0},
    "eval": {"every": 0},
}


def pretrained(folder: Path, prefix: str, router: dict[str, Any]) -> Path:
    """A model that has seen one step of text."""
    data = {"train": prefix, "valid": prefix, "test": prefix, "tokenizer": "bytes"}
    model, run = {"model": {**MODEL, "router": router}, "data": data}, {"run": {"dir": str(folder)}}
    one_step = {"train": {**QUICK["train"], "steps": 1}, "eval": {"max_rows": 1}, "sample": QUICK["sample"]}
    return train(parse(run | model | one_step, "test"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def base(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pretrained(tmp_path_factory.mktemp("base") / "run", prefix, RECURRENT)
    dist.destroy_process_group()
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    found = {
        "train": write_examples(folder / "train.json", chats(160)),
        "valid": write_examples(folder / "valid.jsonl", chats(20, 1)),
    }
    rng = random.Random(0)
    for split, count in (("sst_train", 160), ("sst_valid", 30)):
        words = [
            " ".join(rng.choices(("bad awful poor", "good great fine")[i % 2].split(), k=rng.randint(1, 5)))
            for i in range(count)
        ]
        table = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(words))
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + table)
        found[split] = str(folder / f"{split}.tsv")
    return found


def config_of(base: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    content: dict[str, Any] = {**QUICK, "run": {"dir": str(folder)}, "checkpoint": {"init_from": str(base)}}
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return parse(on_checkpoint(content), "test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = [p for p in (folder / "checkpoints").iterdir() if p == max((folder / "checkpoints").iterdir())]
    return {tensor.name: tensor.load() for tensor in logical_tensors(path)}


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fine_tuning_lowers_the_held_out_loss_of_responses(frozen: bool, base: Path, files: dict, tmp_path: Path) -> None:
    sft = {"train": files["train"], "valid": files["valid"], "epochs": 4}
    model = {"router": {**RECURRENT, "frozen": frozen, "frozen_cell": frozen}}
    folder = finetune(
        config_of(base, tmp_path / "run", sft=sft, eval={"every": 9}, model=model, checkpoint={"every": 9, "keep_last": 9})
    )
    steps, held_out = rows(folder), rows(folder, "eval")
    assert [(row["split"], row["step"]) for row in held_out] == [
        ("valid", step) for step in (*range(9, len(steps), 9), len(steps))
    ]
    assert len(steps) == load_run(folder / "config.yaml").train.steps == steps[-1]["step"]
    assert held_out[-1]["tokens"] == sum(len(one["messages"][1]["content"]) + 1 for one in chats(20, 1))
    assert held_out[-1]["perplexity"] == pytest.approx(math.exp(held_out[-1]["loss"]))
    assert held_out[-1]["loss"] < held_out[0]["loss"] < steps[0]["cross_entropy"] - 1.0  # of the same task, before an update
    before, after = weights(base), weights(folder)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    router = {name for name in moved if ("router" in name) and not name.endswith("fractions")}
    assert bool(router) is not frozen
    assert {"embedding.weight", "head.weight", "layers.0.mlp.experts.down"} <= moved
    if not frozen:
        goes_on_exactly(folder, base.parent / "gone", tmp_path)


def goes_on_exactly(folder: Path, source: Path, aside: Path) -> None:
    """Hide all checkpoints of a run but the first, start it again without what it began with, and compare."""
    whole = [row["loss"] for row in rows(folder)], [row["loss"] for row in rows(folder, "eval")]
    saved = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in saved[:2]] == ["step-00000009", "step-00000018"]
    for path in saved[1:]:
        path.rename(aside / path.name)
    content = {"checkpoint": {"init_from": str(source)}, "sft": load_run(folder / "config.yaml").sft.model_dump()}
    again = on_checkpoint({**QUICK, **content, "run": {"dir": str(folder)}, "eval": {"every": 9}})
    finetune(parse(again, "test"))
    assert ([row["loss"] for row in rows(folder)], [row["loss"] for row in rows(folder, "eval")]) == whole


@pytest.mark.slow
def test_the_command_goes_on_with_other_ranks(base: Path, files: dict, tmp_path: Path) -> None:
    """Started on one rank, stopped after its checkpoint at step 3, and started again on two."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(QUICK))
    words = [str(tmp_path / "run.yaml"), f"checkpoint.init_from={base}", "checkpoint.every=3", "checkpoint.keep_last=9"]
    words += [f"sft.train={files['train']}", f"sft.valid={files['valid']}", "sft.epochs=1", f"run.dir={tmp_path / 'run'}"]
    done = launch("sft", *words)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stderr
    assert "starts from the weights of" in done.stdout
    whole, [held_out] = [row["loss"] for row in rows(tmp_path / "run")], rows(tmp_path / "run", "eval")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.rename(tmp_path / path.name)
    done = launch("sft", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stdout
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(whole, rel=1e-4)
    assert rows(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(held_out["loss"], rel=1e-4)
    wrong = launch("pretrain", *words)
    assert wrong.returncode == 2
    assert "only launch/sft.py trains on examples" in wrong.stderr


@pytest.mark.parametrize("router", [RECURRENT, pytest.param(DISCRETE, marks=pytest.mark.slow)])
def test_a_classifier_learns_and_is_opened_again_with_its_head(
    router: dict, base: Path, prefix: str, files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if router["name"] == "vqmoe":
        base = pretrained(tmp_path / "both", prefix, {"name": "vqmoe"})
    sft = {"task": "classification", "train": files["sst_train"], "test": files["sst_valid"], "epochs": 3}
    config = config_of(base, tmp_path / "run", sft=sft, model={"router": router}, train={"seq_len": 32})
    folder = finetune(config)
    [found] = rows(folder, "eval")
    assert found["accuracy"] == 1.0
    assert found["classes"] == {name: {"examples": 15, "correct": 15, "predicted": 15} for name in "01"}
    assert weights(folder)["head.weight"].shape == (2, 32)
    kept = load_run(folder / "config.yaml")
    assert (kept.model.num_classes, kept.sft.classes) == (2, ["0", "1"])
    finetune(config)  # is done, and evaluates what it loads
    assert rows(folder, "eval") == [found]
    assert "a new head of 2 classes" in capsys.readouterr().out
    for open_it in (restore, open_native):
        with pytest.raises(UserError, match=r"model.num_classes=2: .* holds a classifier"):
            open_it(folder)
    if router["name"] == "vqmoe":
        there = {name for name in weights(base) if name not in weights(folder)}
        assert {name.rpartition(".")[2] for name in there} == {"embedding", "mixer", "mixer_bias"}
        before, after = weights(base), weights(folder)
        assert torch.equal(before["layers.0.mlp.router.codebook"], after["layers.0.mlp.router.codebook"])
        assert not torch.equal(before["layers.0.mlp.experts.down"], after["layers.0.mlp.experts.down"])


def test_what_cannot_be_fine_tuned_is_refused(base: Path, files: dict, prefix: str, tmp_path: Path) -> None:
    sft, run = {"train": files["train"], "epochs": 1}, tmp_path / "run"
    with pytest.raises(UserError, match=r"sft.train=null: fine-tuning starts from a checkpoint and trains on examples"):
        finetune(config_of(base, run))
    with pytest.raises(UserError, match=r"checkpoint.init_from=null"):
        finetune(parse({**QUICK, "run": {"dir": str(run)}, "sft": sft}, "test"))
    CharacterTokenizer(range(256)).save(tmp_path / "vocabulary")
    with pytest.raises(UserError, match=r"data.tokenizer=.*vocabulary"):
        finetune(config_of(base, run, sft=sft, data={"tokenizer": str(tmp_path / "vocabulary")}))
    with pytest.raises(UserError, match=r"cannot be loaded into this model: .*head"):
        finetune(config_of(base, run, sft=sft, model={"tie_embeddings": True}))
    with pytest.raises(UserError, match=r"only launch/sft.py trains on examples"):
        train(config_of(base, run, sft=sft))
    other = tmp_path / "other.tsv"
    other.write_text("sentence\tlabel\nx\t7\n")
    classes = {"task": "classification", "train": files["sst_train"], "valid": str(other)}
    with pytest.raises(UserError, match=r"other.tsv:2: class '7' is none of the 2"):
        finetune(config_of(base, run, sft=classes))
    assert not run.exists()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"optim": {"warmup_ratio": 0.1, "warmup_steps": 10}}, "optim.warmup_ratio=0.1: optim.warmup_steps=10 says how long"),
        (
            {"sft": {"train": "x.json"}, "data": {"mask_documents": False}},
            "data.mask_documents=False: examples that share a row",
        ),
        ({"sft": {"task": "classification"}}, "sample.max_tokens=200: a classifier writes no text"),
        ({"sft": {"classes": ["a", "a"]}}, "sft.classes=.*: must be at least two names, each once"),
        ({"model": {"num_classes": 2}}, "model.num_classes=2: only sft.task=classification"),
        (
            {
                "model": {"num_classes": 3},
                "parallel": {"tp": 2},
                "sft": {"task": "classification"},
                "sample": {"max_tokens": 0},
            },
            "model.num_classes=3: must be a multiple of parallel.tp=2",
        ),
    ],
)
def test_conflicts_are_named(sections: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(sections, "test")


def test_the_warm_up_is_a_share_of_all_steps() -> None:
    from moe_train.optim import learning_rate

    optim = load_run(Path(__file__).parents[2] / "configs" / "sft_alpaca.yaml").optim
    assert (optim.warmup(1219), optim.lr, optim.weight_decay) == (37, 2e-5, 0.0)  # ceil(0.03 * 1219), as transformers' Trainer
    assert learning_rate(optim, 37, 1219) == 2e-5
    assert learning_rate(optim, 1219, 1219) == 0.0
    assert parse({}, "test").optim.warmup(1000) == 100
