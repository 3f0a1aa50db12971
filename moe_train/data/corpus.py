"""The default corpus: text that every machine with Python has, so that the first run needs no download.

It is the sources of the running interpreter's standard library without tests, about 11 MB, and pydoc's topics, the language
reference in plain text. A file, or a topic, is a document; its label is its package ("modules" for single files, "pydoc" for
topics). A hash of its name puts it into train (90%), valid or test (5% each), so that a held-out file was never seen and a
new version of Python moves no file to another split. The encodings are many near-copies of one file: look at figures per label
before reading much into a total.
"""

import contextlib
import fcntl
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_train.data.indexed import IndexedDataset
from moe_train.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

SPLITS = ("train", "valid", "test")
SMALLEST = 2_000_000  # bytes of sources; fewer means an interpreter that came without them

_NO_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Written for the machine that compiled the interpreter, and topics.py is the topics once more.
_GENERATED = ("config-", "_sysconfigdata", "pydoc_data/topics.py")


@dataclass(frozen=True)
class Source:
    """One document of the corpus."""

    name: str
    label: str
    text: bytes

    @property
    def split(self) -> str:
        """Where the name's hash puts the document."""
        bucket = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") % 20
        return {0: "valid", 1: "test"}.get(bucket, "train")


def read_sources() -> list[Source]:
    """Return the corpus in the order of names. Raises UserError for an interpreter without its sources."""
    sources = [*_library(Path(sysconfig.get_path("stdlib"))), *_topics()]
    size = sum(len(source.text) for source in sources)
    if size < SMALLEST:
        raise UserError(
            f"the standard library in {sysconfig.get_path('stdlib')} has {size} bytes of sources, too few for the default "
            "corpus; install the full Python, or name your own data in data.train, data.valid and data.test"
        )
    return sorted(sources, key=lambda source: source.name)


def _library(root: Path) -> Iterator[Source]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NO_SOURCES]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if path.suffix == ".py" and path.is_file() and not name.startswith(_GENERATED):
                package, slash, _ = name.partition("/")
                yield Source(name, package if slash else "modules", path.read_bytes())


def _topics() -> Iterator[Source]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package it apart
        return
    for topic, text in topics.items():
        yield Source(f"pydoc_data/topics/{topic}", "pydoc", text.encode())


def _fingerprint(sources: list[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr((source.name, source.label, hashlib.sha256(source.text).hexdigest())).encode())
    return "sha256-" + digest.hexdigest()


def build_default_corpus(folder: str | os.PathLike[str], tokenizer: str | os.PathLike[str] = "bytes") -> dict[str, Path]:
    """Write the corpus below `folder` and return the prefixes of train, valid and test.

    What is there already and was made from the same sources with the same tokenizer is kept. Each tokenizer has a folder of its
    own. Several processes may call this at once. Raises UserError when the corpus cannot be read or written.
    """
    encoder = load_tokenizer(tokenizer)
    sources = read_sources()
    fingerprint = _fingerprint(sources)
    name = encoder.name if not encoder.suffix else f"{encoder.name}-{encoder.fingerprint.removeprefix('sha256-')[:12]}"
    prefixes = {split: Path(folder, name, split) for split in SPLITS}
    try:
        with _locked(Path(folder, name)):
            for split, prefix in prefixes.items():
                if not _is_current(prefix, fingerprint, encoder):
                    _write(prefix, [s for s in sources if s.split == split], sources, encoder, fingerprint)
    except OSError as error:
        raise UserError(f"cannot write the default corpus to {folder}: {error.strerror or error}") from None
    return prefixes


def train_default_sentencepiece(folder: str | os.PathLike[str], vocab_size: int) -> Path:
    """Train a SentencePiece model on the train split, write it below `folder` and return its path."""
    path = Path(folder, f"sentencepiece-{vocab_size}.model")
    train_sentencepiece((s.text for s in read_sources() if s.split == "train"), path, vocab_size)
    return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into a folder; a killed one frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_current(prefix: Path, fingerprint: str, tokenizer: Tokenizer) -> bool:
    try:
        sidecar = IndexedDataset(prefix).sidecar
    except UserError:
        return False
    return sidecar is not None and (sidecar.source, sidecar.fingerprint) == (fingerprint, tokenizer.fingerprint)


def _write(prefix: Path, split: list[Source], everything: list[Source], tokenizer: Tokenizer, fingerprint: str) -> None:
    # All splits number all labels alike.
    labels = sorted({source.label for source in everything})
    with DatasetWriter(prefix, tokenizer, label_names=labels, source=fingerprint) as writer:
        for source in split:
            if source.text:
                writer.add_text(source.text, source.label)
