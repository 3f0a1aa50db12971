"""Turn text into a dataset: `python launch/prepare_data.py INPUT... --output PREFIX [options]`.

INPUT is a text file (one document), a .jsonl file (a document per line) or a folder of such files. The result, PREFIX.bin and
PREFIX.idx, is Megatron-LM's format; PREFIX.json and PREFIX.labels say which tokenizer made it and where documents come from.
`--default-corpus DIR` writes the corpus that a run without data takes: Python's standard library and pydoc's topics.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from moe_train.data.corpus import build_default_corpus, train_default_sentencepiece
from moe_train.data.indexed import IndexedDataset, beside
from moe_train.data.prepare import Inputs, Summary, prepare
from moe_train.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from moe_train.errors import UserError


def run(words: list[str]) -> None:
    """Prepare what `words` describe."""
    given = _parser().parse_args(words)
    if given.train_sentencepiece is not None and given.tokenizer is not None:
        raise UserError("--tokenizer and --train-sentencepiece are two answers to one question; give one of them")
    if given.default_corpus is not None:
        if given.inputs or given.output:
            raise UserError("--default-corpus DIR takes neither inputs nor --output")
        _default_corpus(given)
        return
    if not given.inputs or given.output is None:
        raise UserError("give at least one INPUT and --output PREFIX, or --default-corpus DIR; --help explains them")
    inputs = Inputs(given.inputs, given.field, given.label_field, without=given.output)
    tokenizer = _tokenizer(given, inputs)
    _report(given.output, prepare(inputs, given.output, tokenizer), tokenizer)


def _parser() -> ArgumentParser:
    parser = ArgumentParser("launch/prepare_data.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="text file, .jsonl or .ndjson file, or folder")
    parser.add_argument("--output", metavar="PREFIX", help="path of the dataset, without .bin or .idx")
    parser.add_argument("--tokenizer", metavar="bytes|FILE", help="bytes (default), or a SentencePiece model")
    parser.add_argument(
        "--train-sentencepiece", metavar="VOCAB", type=int, help="train a model of so many pieces on the inputs"
    )
    parser.add_argument("--field", metavar="NAME", default="text", help="the text of a JSON line (default: text)")
    parser.add_argument("--label-field", metavar="NAME", help="what labels the document of a JSON line (default: no labels)")
    parser.add_argument("--default-corpus", metavar="DIR", type=Path, help="write Python's standard library below DIR")
    return parser


def _tokenizer(given: Namespace, inputs: Inputs) -> Tokenizer:
    if given.train_sentencepiece is None:
        return load_tokenizer(given.tokenizer or "bytes")
    texts = (document.text for document in inputs.documents())
    return train_sentencepiece(texts, None, given.train_sentencepiece)


def _report(output: str, summary: Summary, tokenizer: Tokenizer) -> None:
    labels = IndexedDataset(output).label_names[1:]
    print(
        f"{beside(output, '')}: {summary.documents} documents, {summary.bytes_of_text} bytes, {summary.tokens} tokens "
        f"({tokenizer.name}, {tokenizer.vocab_size} ids)" + (f", {len(labels)} labels" if labels else "")
    )
    if tokenizer.suffix:
        print(f"tokenizer: {beside(output, tokenizer.suffix)}")
    if summary.empty:
        print(f"left out {summary.empty} documents without text")
    if summary.invalid:
        print(f"{summary.invalid} documents are no valid UTF-8; their bytes are kept as they are")


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
