"""Turn text into a dataset: `python launch/prepare_data.py INPUT... --output PREFIX [options]`.

INPUT is a text file (one document, or with --lines one per line), a .jsonl file (a document per line), either of them with .gz or
.zst, or a folder of such files. The result, PREFIX.bin and PREFIX.idx, is Megatron-LM's format; PREFIX.json and PREFIX.labels say
which tokenizer made it and where documents come from. Killed, the same command goes on with what is not done yet.
`--recipe NAME FILE --output FOLDER` writes the train, valid and test datasets of a corpus that papers use (enwik8, text8, wikitext-103,
lm1b) from the files that you have. `--default-corpus DIR` writes the corpus that a run without data takes: Python's standard library
and pydoc's topics.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moe_train.data.attack import SHARE
from moe_train.data.characters import CharacterTokenizer
from moe_train.data.corpus import build_default_corpus, train_default_sentencepiece
from moe_train.data.indexed import IndexedDataset, beside
from moe_train.data.inputs import Inputs
from moe_train.data.prepare import Summary, prepare
from moe_train.data.recipes import RECIPES, prepare_recipe
from moe_train.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moe_train.data.words import WordTokenizer
from moe_train.errors import UserError


def run(words: list[str]) -> None:
    """Prepare what `words` describe."""
    given = _parser().parse_args(words)
    if given.train_sentencepiece is not None and given.tokenizer is not None:
        raise UserError("--tokenizer and --train-sentencepiece are two answers to one question; give one of them")
    if given.workers < 1 or not 0 <= given.swap_words < 1 or given.min_count < 1:
        raise UserError("--workers and --min-count must be at least 1, --swap-words a share from 0 to below 1")
    if given.default_corpus is not None:
        if given.inputs or given.output:
            raise UserError("--default-corpus DIR takes neither inputs nor --output")
        _default_corpus(given)
        return
    if not given.inputs or given.output is None:
        raise UserError("give at least one INPUT and --output PREFIX, or --default-corpus DIR; --help explains them")
    if given.recipe is not None:
        _recipe(given)
        return
    inputs = Inputs(
        given.inputs,
        given.field,
        given.label_field,
        without=given.output,
        lines=given.lines,
        invalid_utf8=given.invalid_utf8,
        skip_bad_lines=given.skip_bad_lines,
        swap_words=given.swap_words,
        seed=given.seed,
    )
    tokenizer = _tokenizer(given, inputs)
    summary = _prepare(inputs, given.output, tokenizer, given.workers)
    _report(given.output, summary, tokenizer, replaced=given.invalid_utf8 == "replace")


def _prepare(inputs: Inputs, output: str | Path, tokenizer: Tokenizer, workers: int) -> Summary:
    """Prepare behind a progress bar, where there is a terminal to draw it on."""
    console = Console(stderr=True)
    columns = (
        TextColumn(f"{beside(output, '').name}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return prepare(
            inputs,
            output,
            tokenizer,
            workers=workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _recipe(given: Namespace) -> None:
    if given.tokenizer is not None or given.train_sentencepiece is not None or len(given.inputs) != 1:
        raise UserError("--recipe takes one INPUT, the file or folder of the corpus, and brings its own tokenizer")
    for split, summary in prepare_recipe(
        given.recipe,
        Path(given.inputs[0]),
        Path(given.output),
        lambda inputs, output, tokenizer: _prepare(inputs, output, tokenizer, given.workers),
    ).items():
        prefix = Path(given.output, split)
        sidecar = IndexedDataset(prefix).sidecar
        assert sidecar is not None
        print(f"{prefix}: {summary.tokens} tokens of {sidecar.vocab_size} ({sidecar.tokenizer})")


def _parser() -> ArgumentParser:
    parser = ArgumentParser("launch/prepare_data.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="text file, .jsonl or .ndjson file (.gz, .zst), or folder")
    parser.add_argument("--output", metavar="PREFIX", help="path of the dataset, without .bin or .idx")
    parser.add_argument(
        "--tokenizer",
        metavar="bytes|characters|words|FILE",
        help="bytes (default); characters or words of the inputs; or a SentencePiece model, a tokenizer.json, a .vocab file",
    )
    parser.add_argument(
        "--train-sentencepiece", metavar="VOCAB", type=int, help="train a model of so many pieces on the inputs"
    )
    parser.add_argument("--field", metavar="NAME", default="text", help="the text of a JSON line (default: text)")
    parser.add_argument("--label-field", metavar="NAME", help="what labels the document of a JSON line (default: no labels)")
    parser.add_argument("--lines", action="store_true", help="each line of a text file is a document")
    parser.add_argument("--min-count", metavar="N", type=int, default=1, help="with --tokenizer words: rarer words are <unk>")
    parser.add_argument(
        "--invalid-utf8",
        choices=["keep", "replace", "error"],
        default="keep",
        help="bytes that are no valid UTF-8: keep them (default), replace them by U+FFFD, or stop; the first two count documents",
    )
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out and count wrong JSON lines instead of stopping"
    )
    parser.add_argument(
        "--swap-words",
        metavar="SHARE",
        type=float,
        nargs="?",
        const=SHARE,
        default=0.0,
        help=f"for robustness tests: replace this share of each line's words by AAA (ACMoE's attack; {SHARE} where none is given)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --swap-words")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--recipe", choices=list(RECIPES), help="INPUT is this corpus; --output names a folder")
    parser.add_argument("--default-corpus", metavar="DIR", type=Path, help="write Python's standard library below DIR")
    return parser


def _tokenizer(given: Namespace, inputs: Inputs) -> Tokenizer:
    texts = inputs.texts()
    if given.train_sentencepiece is not None:
        return train_sentencepiece(texts, None, given.train_sentencepiece)
    if given.tokenizer == CharacterTokenizer.name:
        return CharacterTokenizer.read(texts)
    if given.tokenizer == WordTokenizer.name:
        return WordTokenizer.read(texts, given.min_count)
    return load_tokenizer(given.tokenizer or "bytes")


def _report(output: str, summary: Summary, tokenizer: Tokenizer, replaced: bool) -> None:
    labels = IndexedDataset(output).label_names[1:]
    print(
        f"{beside(output, '')}: {summary.documents} documents, {summary.bytes_of_text} bytes, {summary.tokens} tokens "
        f"({tokenizer.name}, {tokenizer.vocab_size} ids)" + (f", {len(labels)} labels" if labels else "")
    )
    if tokenizer.suffix:
        print(f"tokenizer: {beside(output, tokenizer.suffix)}")
    if summary.empty:
        print(f"left out {summary.empty} documents without text")
    if summary.skipped:
        print(f"left out {summary.skipped} wrong lines")
    if summary.invalid:
        done = "what is not was replaced by U+FFFD" if replaced else "their bytes are kept as they are"
        print(f"{summary.invalid} documents are no valid UTF-8; {done}")


def _default_corpus(given: Namespace) -> None:
    tokenizer = given.tokenizer or "bytes"
    if given.train_sentencepiece is not None:
        tokenizer = train_default_sentencepiece(given.default_corpus, given.train_sentencepiece)
        print(f"tokenizer: {tokenizer}")
    for prefix in build_default_corpus(given.default_corpus, tokenizer).values():
        dataset = IndexedDataset(prefix)
        assert dataset.sidecar is not None
        print(f"{prefix}: {len(dataset)} documents, {dataset.sidecar.num_bytes} bytes, {dataset.num_tokens} tokens")


if __name__ == "__main__":
    # Not cli.main, which is for runs: it would import torch, seconds for nothing.
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is not done yet", file=sys.stderr)
        sys.exit(130)
