"""What a user's mistake or a full disk looks like: one message with the remedy, status 2, nothing overwritten."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus
from launches import Launch, command, launch
from tiny_run import content, rows, words_for
from torchruns import Torchrun

from moe_train.checkpoint import dcp
from moe_train.checkpoint.manifest import read_manifest
from moe_train.data.characters import CharacterTokenizer
from moe_train.data.indexed import HEADER, MAGIC
from moe_train.data.loader import Loader
from moe_train.data.writer import DatasetWriter
from moe_train.errors import UserError

SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def words(prefix: str) -> list[str]:
    return [*words_for(prefix), "train.steps=4", "sample.max_tokens=0", "eval.every=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    done = launch("pretrain", *words, f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run folder of this test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def newest(run: Path) -> Path:
    return dcp.checkpoints(run / "checkpoints")[-1]


def assert_refused(words: list[str], parts: tuple[str, ...], ranks: int = 1) -> None:
    done = launch("pretrain", *words, ranks=ranks)
    assert_one_message(done.stderr, done.returncode, parts)


def assert_one_message(stderr: str, status: int, parts: tuple[str, ...]) -> None:
    assert status == 2, stderr
    assert stderr.count("error: ") == 1
    assert "Traceback" not in stderr
    assert not [part for part in parts if part not in stderr], stderr


# --- The run file and its words --------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": (["model.hiden_size=64"], ("model.hiden_size: unknown key", "did you mean model.hidden_size?")),
    "unknown section": (["modle.hidden_size=64"], ("modle: unknown key", "did you mean model?")),
    "wrong type": (["train.steps=many"], ("train.steps='many'", "valid integer")),
    "two at once": (["train.steps=-1", "optim.lr=fast"], ("2 problem(s)", "train.steps=-1", "optim.lr='fast'")),
    "heads": (
        ["model.num_heads=5"],
        ("model.num_heads=5: must divide model.hidden_size=32", "change it or set model.head_dim"),
    ),
    "no experts": (["model.num_experts=0"], ("model.num_experts=0", "greater than 0")),
    "too many choices": (["model.router.top_k=5"], ("model.router.top_k=5: must be at most model.num_experts=4", "lower it")),
    "batch": (["train.global_batch_size=10"], ("must be a multiple of train.micro_batch_size=4", "change")),
    "rows longer than the data": (["train.seq_len=1000000"], ("fewer than one row of 1000000", "lower train.seq_len")),
    "no device": (["train.device=cuda"], ("no CUDA device", "use auto or cpu")),
    "no data": (
        ["data.train=/nowhere/text"],
        ("data.train=/nowhere/text: dataset file /nowhere/text.idx does not exist", "named by its path without"),
    ),
    "no validation data": (
        ["data.valid=/nowhere/text"],
        ("data.valid=/nowhere/text: dataset file /nowhere/text.idx does not exist", "named by its path without"),
    ),
    "no tokenizer": (["data.tokenizer=/nowhere/bpe.model"], ("/nowhere/bpe.model",)),
    "small vocabulary": (["model.vocab_size=8"], ("model.vocab_size=8: smaller than the 257 ids", "raise it, or leave it out")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_run(name: str, words: list[str], tmp_path: Path) -> None:
    wrong, parts = MISTAKES[name]
    if name == "no device" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a CUDA device")
    assert_refused([*words, *wrong, f"run.dir={tmp_path / 'run'}"], parts)
    assert not (tmp_path / "run").exists()


def test_a_run_file_that_is_not_there(tmp_path: Path) -> None:
    assert_refused([str(tmp_path / "gone.yaml")], ("gone.yaml: cannot be read as a run file", "No such file"))


def test_two_ranks_say_it_once(words: list[str], tmp_path: Path) -> None:
    assert_refused(
        [*words, "data.train=/nowhere/text", f"run.dir={tmp_path / 'run'}"], ("/nowhere/text.idx does not exist",), ranks=2
    )


# --- Data ------------------------------------------------------------------------------------------------------------------------


def truncate_tokens(prefix: str) -> None:
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)


def take_another_index(prefix: str) -> None:
    other = write_corpus(Path(prefix).parent / "other", documents=30, seed=1)
    shutil.copy(f"{other}.idx", f"{prefix}.idx")


def empty(prefix: str) -> None:
    """As Megatron-LM would write a corpus without documents."""
    Path(f"{prefix}.bin").write_bytes(b"")
    Path(f"{prefix}.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8))
    for suffix in (".json", ".labels"):
        Path(prefix + suffix).unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (truncate_tokens, ("text.bin is damaged", "its index ends at byte", "copy it again")),
        (take_another_index, ("text.bin is damaged", "copy it again")),
        (empty, ("has 0 tokens, fewer than one row of 32", "add data")),
    ],
)
def test_damaged_data(damage: Callable[[str], None], parts: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "text")
    damage(prefix)
    before = content(tmp_path)
    assert_refused([*words, f"data.train={prefix}", f"run.dir={tmp_path / 'run'}"], parts)
    assert content(tmp_path) == before


def test_data_that_only_one_rank_finds_damaged(words: list[str], tmp_path: Path) -> None:
    """The other rank loses its connection; what the user sees is the cause."""
    prefix = write_corpus(tmp_path / "text")
    loader = Loader(prefix, seq_len=32, micro_batch_size=4, global_batch_size=8, seed=0, dp_rank=1, dp_size=2)
    row = int(loader.next_step().microbatches[0].rows[0])
    tokens = np.memmap(f"{prefix}.bin", dtype="<u2", mode="r+")
    tokens[row * 32 + 5] = 60000
    tokens.flush()
    parts = (f"id 60000 at token {row * 32 + 5}", "prepared with another tokenizer, or is damaged")
    assert_refused([*words, f"data.train={prefix}", f"run.dir={tmp_path / 'run'}"], parts, ranks=2)


# --- Run folders and checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ("model.hidden_size=64", ("holds a run with another model", "model.hidden_size=32 there, 64 here", "another run.dir")),
        ("model.router.name=topk", ("holds a run with another model", "model.router.name=recurrent there, topk here")),
        ("train.seq_len=16", ("train.seq_len=16: was 32", "set it back, or start a new run")),
        ("run.seed=1", ("run.seed=1: was 0", "set it back, or start a new run")),
        ("train.steps=2", ("train.steps=2", "step-00000004 is beyond that", "raise train.steps")),
        ("data.train={other}", ("is not the one that the run was saved with", "give the same data")),
    ],
)
def test_the_folder_of_another_run(wrong: str, parts: tuple[str, ...], run: Path, words: list[str], tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=1)
    before = content(run)
    assert_refused([*words, wrong.format(other=other), f"run.dir={run}"], parts)
    assert content(run) == before


def test_the_folder_of_a_run_with_another_tokenizer(run: Path, words: list[str], tmp_path: Path) -> None:
    """Its size is one of the model's, which is not what the user has to correct."""
    tokenizer = CharacterTokenizer.read([b"def x = 1"])
    tokenizer.save(tmp_path / "characters")
    with DatasetWriter(tmp_path / "other", tokenizer) as writer:
        for _ in range(100):
            writer.add_text("def x = 1")
    keys = [f"data.{split}={tmp_path / 'other'}" for split in ("train", "valid", "test")]
    keys = [*words, *keys, f"data.tokenizer={tmp_path / 'characters'}"]
    before = content(run)
    for key, folder in ((f"run.dir={run}", run), (f"checkpoint.init_from={run}", newest(run))):
        parts = (f"data.tokenizer={tmp_path / 'characters'}: not the one of {folder}, ", f"give {folder / 'tokenizer'}")
        assert_refused([*keys, f"run.dir={tmp_path / 'new'}", key], parts)
    (run / "config.yaml").unlink()  # only the checkpoint knows
    parts = (f"data.tokenizer={tmp_path / 'characters'}: not the one of {newest(run)}, ", "ids mean something else")
    assert_refused([*keys, f"run.dir={run}"], parts)
    assert content(run).items() <= before.items()
    assert not (tmp_path / "new").exists()


def test_a_run_folder_that_is_a_file(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(
        [*words, f"run.dir={tmp_path / 'file'}"], (f"{tmp_path / 'file'}: cannot be written", "choose another run.dir")
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_of_another_architecture(run: Path, words: list[str], tmp_path: Path) -> None:
    """Copied into the run's folder."""
    wide = tmp_path / "wide"
    assert launch("pretrain", *words, "model.ffn_hidden_size=64", "train.steps=6", f"run.dir={wide}").returncode == 0
    shutil.copytree(newest(wide), run / "checkpoints" / newest(wide).name)
    before = content(run)
    parts = ("step-00000006 holds a run with another model", "model.ffn_hidden_size=64 there, 32 here", "give the same model")
    assert_refused([*words, "train.steps=8", f"run.dir={run}"], parts)
    assert content(run) == before


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    """Somewhere in the middle: in a shard, in a tensor's numbers."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
@pytest.mark.parametrize("file", [SHARD, "manifest.json"])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], file: str, run: Path, words: list[str]) -> None:
    damage(newest(run) / file)
    before = content(run)
    assert_refused([*words, "train.steps=6", f"run.dir={run}"], (str(newest(run)), file, "remove this one"))
    assert content(run) == before


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", [".metadata", "config.yaml", "tokenizer", "rng.safetensors"])
def test_a_damaged_file_is_noticed_before_it_is_read(damage: Callable[[Path], None], file: str, run: Path) -> None:
    path = newest(run)
    damage(path / file)
    with pytest.raises(UserError, match=f"{path}: damaged: {file} .*remove this one"):
        read_manifest(path)


def test_after_removing_a_damaged_checkpoint_the_one_before_is_taken(run: Path, words: list[str]) -> None:
    """As the message says. Two ranks share the work of checking."""
    flip_a_bit(newest(run) / SHARD)
    assert_refused([*words, f"run.dir={run}"], (str(newest(run)), SHARD, "remove this one"), ranks=2)
    shutil.rmtree(newest(run))
    done = launch("pretrain", *words, f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout


@pytest.mark.parametrize("file", [".metadata", "manifest.json"])
def test_a_checkpoint_without_its_index_is_damaged(file: str, run: Path, words: list[str]) -> None:
    """It had it when it got its name: going on from the one before must not happen unasked."""
    (newest(run) / file).unlink()
    before = content(run)
    assert_refused([*words, f"run.dir={run}"], (f"{newest(run)}: damaged: ", file, "remove this one"))
    assert content(run) == before


# --- Disks -----------------------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def mount(self, size: int, *options: str) -> None:
        """Make it `size` bytes large."""
        call = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(self.path)]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Leave no room."""
        with contextlib.suppress(OSError), (self.path / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "run" / "checkpoints")
    yield disk
    subprocess.run(["umount", str(disk.path)], capture_output=True)


def size_of(folder: Path) -> int:
    """Bytes of a folder on a tmpfs, which has pages of 4096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def wait_for(run: Launch, text: str) -> None:
    while text not in run.stdout:
        assert run.running, run.stdout + run.stderr
        time.sleep(0.01)


def test_a_disk_with_room_for_one_checkpoint(disk: Disk, trained: Path, words: list[str]) -> None:
    """The periodic save warns; the last one is an error; the first checkpoint stays; with more room, the command goes on."""
    run, space = disk.path.parent, size_of(newest(trained))
    disk.mount(int(1.6 * space))
    words = [*words, "train.steps=6", f"run.dir={run}"]
    done = launch("pretrain", *words, ranks=2)
    assert f"warning: step 4 is not saved: {disk.path}: cannot be written: No space left on device" in done.stdout
    parts = ("step 6 is not saved", f"{disk.path}: cannot be written: No space left on device", "MB are free", "make room")
    assert_one_message(done.stderr, done.returncode, parts)
    assert [path.name for path in disk.path.iterdir()] == ["step-00000002"]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    disk.mount(10 * space, "remount")
    done = launch("pretrain", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout
    assert read_manifest(newest(run))["step"] == 6


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_for_a_while(asynchronous: bool, disk: Disk, trained: Path, words: list[str]) -> None:
    """Training goes on; each save until there is room is one line; every one after it succeeds."""
    disk.mount(30 * size_of(newest(trained)))
    disk.fill()
    own = ["train.steps=40", "checkpoint.keep_last=40", f"checkpoint.asynchronous={asynchronous}"]
    run = Launch("pretrain", *words, *own, f"run.dir={disk.path.parent}")
    wait_for(run, "warning: step 2 is not saved")
    (disk.path / "ballast").unlink()
    assert run.wait() == 0, run.stderr
    assert [row["step"] for row in rows(disk.path.parent)] == list(range(1, 41))
    warned = [int(line.split()[2]) for line in run.stdout.splitlines() if line.startswith("warning: ")]
    saved = [dcp.step_of(path) for path in dcp.checkpoints(disk.path)]
    assert warned + saved == list(range(2, 41, 2))
    assert saved


def test_a_disk_that_cannot_take_a_line_of_metrics(tmp_path: Path, words: list[str]) -> None:
    disk = Disk(tmp_path / "run")
    disk.mount(4_000_000)
    try:
        run = Launch("pretrain", *words, "train.steps=100000", "checkpoint.every=0", f"run.dir={disk.path}")
        wait_for(run, "step      3/")
        disk.fill()
        assert run.wait() == 2, run.stderr
        message = run.stderr.splitlines()[-1]  # TensorBoard's thread has shown a traceback of its own
        assert message.startswith(f"error: {disk.path}: cannot be written: No space left on device")
        assert "make room" in message
    finally:
        subprocess.run(["umount", str(disk.path)], capture_output=True)


# --- The command itself ----------------------------------------------------------------------------------------------------------


def test_the_command_with_a_mistake(words: list[str], tmp_path: Path) -> None:
    done = command(*words, "model.hiden_size=64", f"run.dir={tmp_path}")
    assert_one_message(done.stderr, done.returncode, ("did you mean model.hidden_size?",))


def test_the_command_with_a_damaged_checkpoint(run: Path, words: list[str]) -> None:
    flip_a_bit(newest(run) / SHARD)
    before = content(run)
    done = command(*words, f"run.dir={run}")
    assert_one_message(done.stderr, done.returncode, (SHARD, "remove this one"))
    assert content(run) == before


def test_torchrun_does_not_start_ranks_again_that_made_a_mistake(
    words: list[str], tmp_path: Path, started: list[Torchrun]
) -> None:
    """It ends as one process does, though it was to start them three times more."""
    options = ("--rdzv-backend=private", "--nproc-per-node=2", "--max-restarts=3")
    run = Torchrun(tmp_path / "out", *options, words=[*words, "model.hiden_size=64", f"run.dir={tmp_path / 'run'}"])
    started.append(run)
    assert run.process.wait(120) == 2, run.said
    assert run.said.count("did you mean model.hidden_size?") == 1
    assert "Traceback" not in run.said


@pytest.mark.slow
def test_torchrun_with_a_mistake(words: list[str], tmp_path: Path) -> None:
    """torchrun adds a report of its own."""
    done = command(*words, "data.train=/nowhere/text", f"run.dir={tmp_path / 'run'}", ranks=2)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "/nowhere/text.idx does not exist" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "ChildFailedError" in done.stderr
