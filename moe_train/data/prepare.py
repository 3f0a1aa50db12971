"""Documents into a dataset, in parts: as many processes as wanted write them, a kill loses the unfinished ones only.

A part is a run of pieces of the inputs (inputs.py) of about PART bytes, and its result a dataset of its own in the folder
`.NAME.parts` beside the output. When all are there they are joined in order, so the result does not depend on the number of
processes. A finished part has a file NUMBER.done that says what it was made from; the same command takes it over.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing.connection import wait
from pathlib import Path

from moe_train.data.indexed import IndexedDataset, beside
from moe_train.data.inputs import OWN, Inputs, Piece
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError
from moe_train.files import write_atomically

PART = 32 << 20  # bytes of input


@dataclass
class Summary:
    """What a preparation wrote, and what it met on the way."""

    documents: int = 0
    tokens: int = 0
    bytes_of_text: int = 0
    empty: int = 0  # documents without text, which were left out
    invalid: int = 0  # documents that are no valid UTF-8
    skipped: int = 0  # lines that are wrong, which were left out

    def add(self, other: "Summary") -> None:
        """Add what another part met."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class Part:
    """Pieces that are written together, to the dataset `prefix`. `key` is a hash of everything that decides the result."""

    pieces: tuple[Piece, ...]
    prefix: Path
    key: str

    @property
    def size(self) -> int:
        """How much work it is, in bytes of input."""
        return sum(piece.size for piece in self.pieces)

    def finished(self) -> Summary | None:
        """Return what it met where it was written before from the same inputs in the same way."""
        try:
            found = json.loads(beside(self.prefix, ".done").read_bytes())
            return Summary(**found["summary"]) if found["key"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def prepare(
    inputs: Inputs,
    output: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write the documents to the dataset `output` with `workers` processes; the result does not depend on their number.

    Memory grows by 4 bytes per document, and by the largest file that is one document where the tokenizer cannot cut it
    (`Tokenizer.cut`: a tokenizer.json, or one that puts a space before a text). `progress` is told the bytes of input
    that are done and all of them. Raises UserError for wrong inputs, and when no document has text; then there is no dataset, and
    finished parts are kept.
    """
    prefix = beside(output, "")
    folder = prefix.with_name(f".{prefix.name}.parts")
    try:
        writer = DatasetWriter(prefix, tokenizer)
        with _locked(folder):
            _remove_leftovers(prefix)
            parts = _plan(inputs, folder, tokenizer)
            summary = Summary()
            done, total = 0, sum(part.size for part in parts)
            for part, met in _write_all(parts, inputs, tokenizer, folder, workers):
                summary.add(met)
                progress(done := done + part.size, total)
            with writer:
                for part in parts:
                    if beside(part.prefix, ".idx").exists():
                        writer.add_dataset(IndexedDataset(part.prefix))
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    return summary


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of parts and keep other processes out of it. Without a finished part it is removed after an error."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another process is preparing this dataset; wait for it, or choose another output"
            ) from None
        try:
            yield
        except BaseException:
            if not any(folder.glob("*.idx")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _remove_leftovers(prefix: Path) -> None:
    """Remove the temporary files that a killed preparation has left beside the output."""
    for suffix in OWN:
        for file in prefix.parent.glob(f".{glob.escape(prefix.name)}{suffix}.*.tmp"):
            file.unlink(missing_ok=True)


def _plan(inputs: Inputs, folder: Path, tokenizer: Tokenizer) -> list[Part]:
    """Divide the inputs, always in the same way."""
    options = {name: value for name, value in asdict(inputs).items() if name not in ("paths", "without")}
    found: list[list[Piece]] = [[]]
    size = 0
    for piece in inputs.pieces(PART):
        if found[-1] and size + piece.size > PART:
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.size
    parts = []
    for number, pieces in enumerate(found):
        stamps = [(str(p.path), p.path.stat().st_mtime_ns, p.start, p.stop, p.size) for p in pieces]
        key = hashlib.sha256(repr((stamps, sorted(options.items()), tokenizer.fingerprint)).encode()).hexdigest()
        parts.append(Part(tuple(pieces), folder / f"{number:06d}", key))
    return parts


def _write_all(
    parts: list[Part], inputs: Inputs, tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[Part, Summary]]:
    """Write what is not finished and yield the parts in order."""
    finished = {part.prefix: met for part in parts if (met := part.finished()) is not None}
    waiting = [part for part in parts if part.prefix not in finished]
    if min(workers, len(waiting)) <= 1:
        for part in parts:
            yield part, finished.get(part.prefix) or _write(part, inputs, tokenizer)
        return
    tokenizer.save(folder / "tokenizer")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(waiting)), context, _follow_parent) as pool:
        futures = {part.prefix: pool.submit(_write_in_worker, part, inputs, folder / "tokenizer") for part in waiting}
        try:
            for part in parts:
                yield part, finished.get(part.prefix) or futures[part.prefix].result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; the same command goes on, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _follow_parent() -> None:
    """End this worker with the process that started it, however that ends; Ctrl-C is for that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_load = cache(load_tokenizer)


def _write_in_worker(part: Part, inputs: Inputs, tokenizer: Path) -> Summary:
    return _write(part, inputs, _load(tokenizer))


def _write(part: Part, inputs: Inputs, tokenizer: Tokenizer) -> Summary:
    """Write one part: its dataset, where it has a document, and then the file that says so."""
    for suffix in (".done", ".idx"):
        beside(part.prefix, suffix).unlink(missing_ok=True)
    summary = Summary()
    with contextlib.ExitStack() as stack:
        writer: DatasetWriter | None = None
        for piece in part.pieces:
            for batch in inputs.read(piece):
                summary.add(Summary(empty=batch.empty, invalid=batch.invalid, skipped=batch.skipped))
                if not batch.texts:
                    continue
                if writer is None:
                    writer = stack.enter_context(DatasetWriter(part.prefix, tokenizer, save_tokenizer=False))
                place = partial(inputs.place, piece, batch)
                if batch.rest:
                    writer.add_text(batch.texts[0], batch.labels[0], batch.rest, place)
                else:
                    writer.add_texts(batch.texts, batch.labels, place)
    if writer is not None:
        summary.documents, summary.tokens, summary.bytes_of_text = writer.num_documents, writer.num_tokens, writer.num_bytes
    done = {"key": part.key, "summary": asdict(summary)}
    write_atomically(beside(part.prefix, ".done"), json.dumps(done).encode())
    return summary
