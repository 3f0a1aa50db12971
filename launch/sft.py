"""Fine-tune a model: `launch/sft.py CONFIG.yaml checkpoint.init_from=RUN sft.train=FILE [section.key=value ...]`, also under torchrun.

The model and the tokenizer are those of the checkpoint, as far as the run does not say otherwise (docs/fine_tuning.md).
"""

import sys
from pathlib import Path

from moe_train.cli import config_from_words, main


def run(words: list[str]) -> None:
    """Read the run that `words` describe and fine-tune."""
    from moe_train.finetune.task import finetune, on_checkpoint

    config = config_from_words(words, "launch/sft.py", __doc__, on_checkpoint)
    finetune(config, Path(words[0]).stem)


if __name__ == "__main__":
    main(run, sys.argv[1:])
