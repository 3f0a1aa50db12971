"""How fast data is prepared and loaded: preparation beside a bare loop over the tokenizer, the loader beside training."""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
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
from moe_train.pretraining import data_loader, settle_vocabulary

PAIRS = 11  # on a shared machine a pair varies by a fifth


def measure_prepare(tokenizer: str, megabytes: float, workers: int, document_bytes: int | None = None) -> dict[str, Any]:
    """Time the preparation of JSON lines made of the default corpus, in pairs with a bare loop over SentencePiece's encode.

    The loop is what a user would write for the same documents, in the fastest form that SentencePiece has. Rates are of text. With one
    worker they are per second of processor time, so that other work on the machine does not count. With several the loop runs in as
    many processes, whose start does not count, while that of ours does. A share is that of one pair, whose two sides follow each
    other; the median pair counts. `document_bytes` cuts documents shorter.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "text.jsonl"), Path(folder, "out")
        texts = list(_texts(int(megabytes * 1e6), document_bytes))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        encoder, size = load_tokenizer(tokenizer), sum(len(text.encode()) for text in texts) / 1e6
        clock = time.process_time if workers == 1 else time.perf_counter
        bare: list[float] = []
        ours: list[float] = []
        for _ in range(PAIRS):
            if isinstance(encoder, SentencePieceTokenizer):
                bare.append(size / _bare_seconds(tokenizer, texts, workers, clock))
            ours.append(size / _seconds(partial(prepare, Inputs([path]), output, encoder, workers=workers), clock))
    rate = statistics.median(ours)
    row = {"what": "prepare", "tokenizer": encoder.name, "vocab_size": encoder.vocab_size, "workers": workers}
    row |= {"megabytes": size, "documents": len(texts), "pairs": PAIRS, "clock": clock.__name__}
    row |= {"megabytes_per_second": rate, "megabytes_per_second_per_worker": rate / workers}
    if bare:
        shares = sorted(a / b for a, b in zip(ours, bare, strict=True))
        row |= {"bare_megabytes_per_second": statistics.median(bare), "share_of_bare": statistics.median(shares)}
        row |= {"share_of_bare_least": shares[0], "share_of_bare_most": shares[-1]}
    return row | machine(torch.device("cpu"))


def _bare_seconds(model: str, texts: list[str], workers: int, clock: Callable[[], float]) -> float:
    if workers == 1:
        return _seconds(partial(_bare_loop, spm.SentencePieceProcessor(model_file=model), texts), clock)
    context = multiprocessing.get_context("spawn")
    ready, spans = context.Barrier(workers), context.SimpleQueue()
    shares = [(model, texts[i::workers], ready, spans) for i in range(workers)]
    processes = [context.Process(target=_bare_share, args=share, daemon=True) for share in shares]
    for process in processes:
        process.start()
    starts, ends = zip(*(spans.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return float(max(ends) - min(starts))


def _bare_share(model: str, texts: list[str], ready: Barrier, spans: "SimpleQueue[tuple[float, float]]") -> None:
    processor = spm.SentencePieceProcessor(model_file=model)
    ready.wait()
    start = time.perf_counter()  # of one clock for all processes
    _bare_loop(processor, texts)
    spans.put((start, time.perf_counter()))


def _bare_loop(processor: spm.SentencePieceProcessor, texts: list[str]) -> None:
    for text in texts:
        processor.encode(text, return_type="numpy")


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


def _texts(size: int, most: int | None) -> Iterator[str]:
    for source in cycle(read_sources()):
        text = source.text.decode("utf-8", errors="replace")
        step = most or max(len(text), 1)
        for start in range(0, len(text), step):
            if size <= 0:
                return
            yield text[start : start + step]
            size -= min(step, len(text) - start)


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
