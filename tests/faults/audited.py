"""launch/pretrain.py, with a list of each path that it opens for writing, makes, renames or deletes: `audited.py LIST CONFIG.yaml ...`.

The environment holds secrets, as that of a real job does.
"""

import os
import runpy
import sys
from typing import Any

SECRETS = {
    "HF_TOKEN": "hf_Q7mB1x9secret",
    "WANDB_API_KEY": "5eCret0a1b2c3d4e5f",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIsecretKEY",
}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def main(words: list[str]) -> None:
    list_, *rest = words
    file = os.open(list_, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            paths = [path]
        elif event in CHANGES:
            paths = [item for item in arguments if isinstance(item, str | bytes | os.PathLike)]
        else:
            return
        for path in paths:
            if not isinstance(path, int):
                os.write(file, os.path.abspath(os.fsdecode(path)).encode() + b"\n")

    os.environ |= SECRETS
    sys.addaudithook(note)
    sys.argv = ["launch/pretrain.py", *rest]
    runpy.run_path("launch/pretrain.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
