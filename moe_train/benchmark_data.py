"""How fast data is prepared and loaded: preparation beside a bare loop over the tokenizer, the loader beside training."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch

from moe_train.benchmark import machine, measure
from moe_train.config import Config
from moe_train.data.corpus import read_sources
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from moe_train.parallel.mesh import start_world
from moe_train.train import data_loader, settle_vocabulary

REPEATS = 15  # short turns: on a shared machine some of them are undisturbed


def measure_prepare(tokenizer: str, megabytes: float, workers: int) -> dict[str, Any]:
    """Time the preparation of JSON lines made of the default corpus; with one worker beside a bare loop over SentencePiece's encode.

    Rates are of text. With one worker they are per second of processor time, so that other work on the machine does not count,
    and the best of REPEATS turns that alternate between both sides.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        texts = list(_texts(int(megabytes * 1e6)))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        encoder, size = load_tokenizer(tokenizer), sum(len(text.encode()) for text in texts) / 1e6
        clock = time.process_time if workers == 1 else time.perf_counter
        bare: list[float] = []
        ours: list[float] = []
        processor = spm.SentencePieceProcessor()
        if beside := isinstance(encoder, SentencePieceTokenizer) and workers == 1:
            processor.load(tokenizer)

        def bare_loop() -> None:
            for text in texts:
                processor.encode(text, return_type="numpy")  # the fastest that it has

        for _ in range(REPEATS):
            if beside:
                bare.append(size / _seconds(bare_loop, clock))
            inputs, output = Inputs([path]), Path(folder, "out")
            ours.append(size / _seconds(partial(prepare, inputs, output, encoder, workers=workers), clock))
    rate = max(ours)
    row = {
        "what": "prepare",
        "tokenizer": encoder.name,
        "vocab_size": encoder.vocab_size,
        "megabytes": size,
        "workers": workers,
    }
    row |= {"megabytes_per_second": rate, "megabytes_per_second_per_worker": rate / workers, "clock": clock.__name__}
    if bare:
        row |= {"bare_megabytes_per_second": max(bare), "share_of_bare": rate / max(bare)}
    return row | machine(torch.device("cpu"))


def measure_loader(config: Config, steps: int) -> dict[str, Any]:
    """Time the loader of a run with data.train alone, and then the run's training steps."""
    world = start_world(config)
    settled, tokenizer = settle_vocabulary(config)
    loader = data_loader(settled, world, tokenizer)
    loader.next_step()
    seconds = _seconds(lambda: [loader.next_step() for _ in range(10 * steps)], time.perf_counter)
    tokens = 10 * steps * config.train.global_batch_size * config.train.seq_len
    training = measure(config, steps, 1)
    row = {"what": "loader", "tokens_per_second": tokens / seconds, "training_tokens_per_second": training["tokens_per_second"]}
    row["times_training"] = row["tokens_per_second"] / row["training_tokens_per_second"]
    shape = {"seq_len": config.train.seq_len, "global_batch_size": config.train.global_batch_size, "data": config.data.train}
    return row | shape | {"weights": config.data.weights, "order": config.data.order} | machine(world.device)


def _texts(size: int) -> Iterator[str]:
    for source in cycle(read_sources()):
        if size <= 0:
            return
        size -= len(source.text)
        yield source.text.decode("utf-8", errors="replace")


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
