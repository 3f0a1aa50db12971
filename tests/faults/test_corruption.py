"""Two hundred accidents to the files of a checkpoint: none is loaded, and each message names the file."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from corpora import write_corpus
from launches import launch
from tiny_run import words_for

from moe_train.checkpoint import dcp, examine
from moe_train.checkpoint.manifest import parse_manifest
from moe_train.errors import UserError

ACCIDENTS = 200


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two ranks."""
    place = tmp_path_factory.mktemp("run")
    words = words_for(write_corpus(place / "text"))
    done = launch(
        "pretrain", *words, "train.steps=2", "eval.every=0", "sample.max_tokens=0", f"run.dir={place / 'run'}", ranks=2
    )
    assert done.returncode == 0, done.stderr
    return dcp.checkpoints(place / "run" / "checkpoints")[-1]


def blank(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to load everything into."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in parse_manifest(path)["tensors"].items():
        section, _, rest = name.partition(".")
        found.setdefault(section, {})[rest] = torch.zeros(entry.shape, dtype=getattr(torch, entry.dtype))
    return found


def harm(file: Path, chance: random.Random) -> str:
    """Flip a byte, cut, or remove."""
    accident = chance.choice(["flip", "flip", "cut", "remove"])
    content = bytearray(file.read_bytes())
    if accident == "remove":
        file.unlink()
    elif accident == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= chance.randint(1, 255)
        file.write_bytes(content)
    return accident


def test_none_is_loaded(one_rank: None, sound: Path, tmp_path: Path) -> None:
    chance, into, seen = random.Random(0), blank(sound), set()
    names = sorted(file.name for file in sound.iterdir())
    assert names == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "config.yaml",
        "manifest.json",
        "rng.safetensors",
        "tokenizer",
    ]
    dcp.load(sound, into)
    for number in range(ACCIDENTS):
        path = Path(shutil.copytree(sound, tmp_path / str(number) / sound.name))
        file = path / chance.choice([name for name in names if (path / name).stat().st_size])
        accident = harm(file, chance)
        seen.add((file.name, accident))
        with pytest.raises(UserError) as caught:
            dcp.load(path, into)
        assert file.name in str(caught.value), (file.name, accident)
        assert "\n" not in str(caught.value)
        wrong = list(examine.problems(path))
        assert wrong, (file.name, accident)
        assert all(file.name in problem for problem in wrong), wrong
        shutil.rmtree(path)
    assert len(seen) > 15
