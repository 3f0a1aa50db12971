"""Sample text from a trained model: `python launch/generate.py RUN_OR_CHECKPOINT --prompt TEXT`."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from moe_train.cli import main


def run(words: list[str]) -> None:
    """Sample as `words` say; rank 0 prints the prompt and what follows it."""
    parser = ArgumentParser("launch/generate.py", description=__doc__)
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("--prompt", default="", help="what the text continues")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args(words)
    if given.max_tokens < 0 or given.temperature < 0:
        parser.error("--max-tokens and --temperature must not be negative")

    from moe_train.evaluate import restore
    from moe_train.generate import generate

    restored = restore(given.model, given.overrides)
    text = generate(
        restored.model.logits,
        restored.tokenizer,
        given.prompt,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        seed=given.seed,
        window=restored.config.train.seq_len,
        device=restored.world.device,
    )
    if restored.world.main:
        print(given.prompt + text)


if __name__ == "__main__":
    main(run, sys.argv[1:])
