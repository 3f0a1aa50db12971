"""Pretraining: a run on corpora, of which the default one is made where none is named."""

import math
from pathlib import Path

import torch.distributed as dist

from moe_train.config import Config, DataSection
from moe_train.data.corpus import build_default_corpus
from moe_train.data.loader import EvalRows, Loader
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.errors import UserError
from moe_train.evaluate import byte_lengths, report
from moe_train.feed import Feed, batch_sizes
from moe_train.parallel.mesh import World

DEFAULT_CORPUS = Path("data/stdlib")
VOCAB_MULTIPLE = 64


def pretraining(config: Config, world: World, tokenizer: Tokenizer) -> tuple[Config, Feed]:
    """Corpora, the default one where none is named, judged by the loss of every token."""
    if config.sft.train is not None:
        raise UserError(
            f"sft.train={config.sft.train}: only launch/sft.py trains on examples; leave it out, or use that command"
        )
    config = config.model_copy(update={"data": settle_corpus(config, world)})
    lengths = byte_lengths(tokenizer)
    feed = Feed(
        data_loader(config, world, tokenizer),
        eval_rows(config, world, tokenizer, "valid", config.eval.max_rows),
        {split: eval_rows(config, world, tokenizer, split) for split in ("valid", "test")},
        lambda engine, rows: report(engine.evaluate(rows, lengths)),
    )
    return config, feed


def settle_corpus(config: Config, world: World) -> DataSection:
    """The data section with the default corpus where it names none. The same on every rank."""
    data = config.data
    if None not in (data.train, data.valid, data.test):
        return data
    if world.main:
        build_default_corpus(DEFAULT_CORPUS, data.tokenizer)
    dist.barrier()
    prefixes = build_default_corpus(DEFAULT_CORPUS, data.tokenizer)
    splits = {split: getattr(data, split) or str(prefixes[split]) for split in ("train", "valid", "test")}
    return data.model_copy(update=splits)


def settle_vocabulary(config: Config) -> tuple[Config, Tokenizer]:
    """The config with `model.vocab_size` set, and the tokenizer. A size that is given may be larger than the tokenizer's."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    multiple = math.lcm(VOCAB_MULTIPLE, config.parallel.tp)
    vocab = config.model.vocab_size or -(-tokenizer.vocab_size // multiple) * multiple
    if vocab < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the {tokenizer.vocab_size} ids of tokenizer {config.data.tokenizer}; "
            "raise it, or leave it out"
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab})}), tokenizer


def data_loader(config: Config, world: World, tokenizer: Tokenizer) -> Loader:
    """This rank's training batches."""
    assert config.data.train is not None  # settle_corpus() fills it in
    return Loader(
        config.data.train,
        **batch_sizes(config, world),
        global_batch_size=config.train.global_batch_size,
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
        weights=config.data.weights,
        contiguous=config.data.order == "contiguous",
    )


def eval_rows(config: Config, world: World, tokenizer: Tokenizer, split: str, max_rows: int | None = None) -> EvalRows:
    """This rank's rows of `valid` or `test`."""
    return EvalRows(
        getattr(config.data, split),
        **batch_sizes(config, world),
        max_rows=max_rows,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
        streams=config.train.global_batch_size if config.train.memory else None,
        key=f"data.{split}",
    )
