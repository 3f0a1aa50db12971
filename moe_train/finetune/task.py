"""Fine-tuning: a run that starts from a checkpoint and trains on examples. All else is the trainer's own."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_train.checkpoint import dcp
from moe_train.cli import load_run, merge
from moe_train.config import Config
from moe_train.data.tokenizer import Tokenizer
from moe_train.engine.native import NativeEngine
from moe_train.errors import UserError
from moe_train.evaluate import CONFIG_FILE, TOKENIZER_FILE, byte_lengths, report
from moe_train.feed import Feed, Rows, batch_sizes
from moe_train.finetune.accuracy import confusion, report_classes
from moe_train.finetune.examples import Cut, Example, Examples, first_part, gather, read_instructions
from moe_train.finetune.labelled import class_names, encode_labelled, read_labelled, without_middle
from moe_train.finetune.packing import PackedLoader, PackedRows
from moe_train.finetune.records import Paths
from moe_train.parallel.mesh import World
from moe_train.train import train

log = logging.getLogger(__name__)


def finetune(config: Config, name: str = "run") -> Path:
    """Fine-tune as `config` says and return the run folder."""
    for key, value in (("sft.train", config.sft.train), ("checkpoint.init_from", config.checkpoint.init_from)):
        if value is None:
            raise UserError(f"{key}=null: fine-tuning starts from a checkpoint and trains on examples; name both")
    return train(config, name, fine_tuning)


def on_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """A run's keys on top of the model and the tokenizer of the run folder that it goes on in, or of the checkpoint it starts from."""
    folder, source = _given(content, "run", "dir"), _given(content, "checkpoint", "init_from")
    if folder is not None and (Path(folder) / CONFIG_FILE).is_file():
        there = Path(folder)
    elif source is not None:
        there = dcp.find(Path(source))
    else:
        return content
    model = load_run(there / CONFIG_FILE).model.model_dump(mode="json", exclude={"num_classes"})
    return merge({"model": model, "data": {"tokenizer": str(there / TOKENIZER_FILE)}}, content)


def _given(content: dict[str, Any], section: str, key: str) -> str | None:
    """A path that a run names; None where it does not, or names what is no path, which will be refused."""
    keys = content.get(section)
    value = keys.get(key) if isinstance(keys, dict) else None
    return value if isinstance(value, str) and "\0" not in value else None


def fine_tuning(config: Config, world: World, tokenizer: Tokenizer) -> tuple[Config, Feed]:
    """Examples, judged by the loss of the responses, or by the accuracy of the classes."""
    splits: dict[str, Paths] = {
        split: path for split in ("train", "valid", "test") if (path := getattr(config.sft, split)) is not None
    }
    if config.sft.task == "classification":
        config, examples = _labelled(config, world, tokenizer, splits)
    else:
        counts = {split: Counter[str]() for split in splits}
        empty = config.sft.empty_response
        examples = {
            split: _gather(config, read_instructions(paths, tokenizer, empty, counts[split]), counts[split], paths, first_part)
            for split, paths in splits.items()
        }
    loader = _loader(config, world, examples["train"])
    if loader.steps is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": loader.steps})})
    if world.main:
        _tell(config, examples, loader)
    held_out = {split: _rows(config, world, examples[split]) for split in splits if split != "train"}
    validation = _rows(config, world, examples["valid"], config.eval.max_rows) if "valid" in examples else None
    return config, Feed(loader, validation, held_out, _judge(config, tokenizer))


def _labelled(
    config: Config, world: World, tokenizer: Tokenizer, splits: dict[str, Paths]
) -> tuple[Config, dict[str, Examples]]:
    """The examples of a classifier, and the config with its classes. Raises UserError where the layout cannot share them out."""
    texts = {split: read_labelled(paths) for split, paths in splits.items()}
    classes = config.sft.classes or class_names(texts["train"], f"sft.train={splits['train']}")
    changes = {"sft": {"classes": classes}, "model": {"num_classes": len(classes)}}
    config = config.model_copy(update={name: getattr(config, name).model_copy(update=keys) for name, keys in changes.items()})
    if found := config.conflicts():
        raise UserError("\n  ".join(map(str, found)))
    return config, {
        split: _gather(config, encode_labelled(texts[split], classes, tokenizer), Counter(), paths, without_middle)
        for split, paths in splits.items()
    }


def _gather(config: Config, examples: Iterable[Example], counts: Counter[str], paths: Paths, cut: Cut) -> Examples:
    return gather(examples, counts, paths, config.train.seq_len, config.sft.too_long, cut)


def _loader(config: Config, world: World, examples: Examples) -> PackedLoader:
    return PackedLoader(
        examples,
        **batch_sizes(config, world),
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        packed=config.sft.pack,
        epochs=config.sft.epochs,
    )


def _rows(config: Config, world: World, examples: Examples, max_rows: int | None = None) -> PackedRows:
    return PackedRows(examples, **batch_sizes(config, world), packed=config.sft.pack, max_rows=max_rows)


def _tell(config: Config, examples: dict[str, Examples], loader: PackedLoader) -> None:
    for split, found in examples.items():
        targets = int(found.target_counts.sum())
        log.info("%s: %s, %d tokens, %d of them learned", split, found.told, len(found.tokens), targets)
    rows, batch = loader.rows.num_rows, config.train.global_batch_size
    passes = f"{config.sft.epochs} epochs" if config.sft.epochs else f"{config.train.steps * batch / rows:.3g} epochs"
    log.info("%d rows, %.1f%% filled; %s are %d steps", rows, 100 * loader.rows.filled, passes, config.train.steps)


def _judge(config: Config, tokenizer: Tokenizer) -> Callable[[NativeEngine, Rows], dict[str, Any]]:
    """Figures of an evaluation: see `Feed.judge`."""
    if config.sft.task == "classification":
        classes = list(config.sft.classes or ())
        return lambda engine, rows: report_classes(*confusion(engine.model, rows, len(classes)), classes)
    lengths = byte_lengths(tokenizer)
    return lambda engine, rows: report(engine.evaluate(rows, lengths))
