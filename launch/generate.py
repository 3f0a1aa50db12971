"""Write text with a trained model: `python launch/generate.py RUN_OR_CHECKPOINT --prompt TEXT [section.key=value ...]`.

One text is printed as it is, after its prompt. Several, and those of --prompts-file, are JSON lines with the keys prompt, sample, text
(what follows the prompt), tokens and reason (end = the model ended the document, stop, length). A text depends on its prompt, on the
seed and on the options, and not on the other prompts. Sample i of a prompt is the one that --seed SEED+i gives.
"""

import json
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.cli import main
from moe_train.errors import UserError

if TYPE_CHECKING:
    from moe_train.generate import Prompt, Written


def run(words: list[str]) -> None:
    """Write as `words` say; rank 0 prints the texts."""
    parser = make_parser()
    given = parser.parse_intermixed_args(words)  # overrides may come after options
    for name, least in (
        ("max_tokens", 0),
        ("temperature", 0),
        ("top_k", 0),
        ("num_samples", 1),
        ("batch_size", 1),
        ("seed", 0),
    ):
        if not least <= getattr(given, name) < 2**62:
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and below 2^62")
    if not 0 < given.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    if "" in given.stop:
        parser.error("--stop must not be empty")
    texts = given.prompt + [text for path in given.prompts_file for text in read_prompts(path)]
    if not given.prompt and not given.prompts_file:
        texts = [""]

    from moe_train.evaluate import restore
    from moe_train.generate import Prompt, Sampling, check_cache, generate, label_number, with_cache, without_cache

    # Every token is a new shape, and compiling one costs more than it could save.
    restored = restore(given.model, ["train.compile=false", *given.overrides])
    model, device = restored.model, restored.world.device
    if given.cache:
        check_cache(restored.config)
    label = 0 if given.label is None else label_number(restored.config, given.label)
    logits = partial(model.logits, label=label)
    predict = with_cache(model.decode, device, label) if given.cache else without_cache(logits, device)
    sampling = Sampling(given.max_tokens, given.temperature, given.top_k, given.top_p, tuple(given.stop))
    prompts = [Prompt(text, given.seed + i) for text in texts for i in range(given.num_samples)]
    start, count = time.perf_counter(), 0
    for first in range(0, len(prompts), given.batch_size):
        batch = prompts[first : first + given.batch_size]
        written = generate(predict, restored.tokenizer, batch, sampling, restored.config.train.seq_len)
        count += sum(one.tokens for one in written)
        if restored.world.main:
            show(batch, written, given.seed, as_json=bool(given.prompts_file) or len(prompts) > 1)
    seconds = time.perf_counter() - start
    if restored.world.main:
        print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)


def make_parser() -> ArgumentParser:
    """The command's words."""
    parser = ArgumentParser("launch/generate.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument(
        "--prompt", action="append", default=[], help="what a text continues; may be repeated; default: nothing"
    )
    parser.add_argument(
        "--prompts-file",
        action="append",
        default=[],
        type=Path,
        help='prompts, one on each line; *.jsonl: JSON strings or objects with the key "prompt"; may be repeated',
    )
    parser.add_argument("--num-samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="choose among so many of the likeliest tokens; 0 = among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest tokens that have this probability")
    parser.add_argument("--stop", action="append", default=[], help="a text ends before this one; may be repeated")
    parser.add_argument(
        "--label", help="label of the documents, by name in the training data or by number, for routers that read it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="texts that are written at once")
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="a forward pass over the whole text for each token: slow, for models that cannot use a cache, in any layout",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file. Raises UserError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as prompts: {error}") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    if path.suffix != ".jsonl":
        return lines
    return [read_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def read_prompt(line: str, where: str) -> str:
    """The prompt on a JSON line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f'{where}: holds no prompt; a line is a JSON string or an object with the key "prompt" and a string')
    return prompt


def show(prompts: "list[Prompt]", written: "list[Written]", seed: int, as_json: bool) -> None:
    """Print a batch of texts."""
    for prompt, one in zip(prompts, written, strict=True):
        row = {
            "prompt": prompt.text,
            "sample": prompt.seed - seed,
            "text": one.text,
            "tokens": one.tokens,
            "reason": one.reason,
        }
        print(json.dumps(row) if as_json else prompt.text + one.text, flush=True)


if __name__ == "__main__":
    main(run, sys.argv[1:])
