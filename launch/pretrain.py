"""Train a model: `torchrun --rdzv-backend=private --nproc-per-node=N launch/pretrain.py CONFIG.yaml [section.key=value ...]`."""

import sys
from pathlib import Path

from moe_train.cli import config_from_words, main


def run(words: list[str]) -> None:
    """Read the run that `words` describe and train it."""
    from moe_train.train import train

    config = config_from_words(words, "launch/pretrain.py", __doc__)
    train(config, Path(words[0]).stem)


if __name__ == "__main__":
    main(run, sys.argv[1:])
