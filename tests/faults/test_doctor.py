"""launch/doctor.py: what it finds right, and what it finds wrong, with the remedy and status 1."""

import re
from pathlib import Path

import pytest
from corpora import write_corpus
from launches import launch
from ranks import run_ranks
from tiny_run import words_for

from moe_train import doctor
from moe_train.cli import parse
from moe_train.parallel.mesh import start_world


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def checks(said: str) -> dict[str, tuple[str, str]]:
    """Check -> (ok or FAIL, what was found)."""
    return {name: (state, found) for state, name, found in re.findall(r"^(ok|FAIL) +([^:\n]+): (.*)$", said, re.MULTILINE)}


def test_two_ranks_with_a_config(prefix: str, tmp_path: Path) -> None:
    done = launch("doctor", *words_for(prefix), f"run.dir={tmp_path / 'run'}", ranks=2)
    found = checks(done.stdout)
    bad = {name for name, (state, _) in found.items() if state != "ok"}
    assert bad <= {"matmul", "disk"}, done.stdout  # a busy machine may be slow
    assert done.returncode == (1 if bad else 0), done.stderr
    assert re.search(r"\d GB/s bus bandwidth for 16 MiB on 2 ranks$", found["all-reduce"][1])
    assert re.search(r"^the ranks' clocks are within \d\.\d+ s$", found["clocks"][1])
    assert re.search(r"\d+ MB/s written and synced", found["disk"][1])
    assert re.search(r"^\d+ tokens in 1 dataset\(s\); 64 places of \d+ tokens read|every token", found["data.train"][1])
    assert {"python", "torch", "same versions", "devices", "room for checkpoints", "tokenizer", "data.test"} <= found.keys()
    assert list(tmp_path.iterdir()) == []  # it has cleaned up, and made no run


def test_nothing_but_the_machine(tmp_path: Path) -> None:
    found = checks(launch("doctor").stdout)
    assert found["config"] == ("ok", "none given: data and model are not checked")
    assert "one rank: not measured" in found["all-reduce"][1]
    assert "data.train" not in found


def devices() -> list[doctor.Check]:
    """The checks of a rank, of which rank 1 has a device that somebody else uses."""
    world = start_world(parse({"train": {"device": "cpu", "micro_batch_size": 1}}, "test"))
    found = [
        doctor.Check("devices", world.rank != 1, f"{world.rank} GB free", "nvidia-smi names it"),
        doctor.Check("clock", True, ""),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "_own_device", lambda world: iter(found))
        return list(doctor._devices(world))


def test_a_device_of_another_rank_is_named() -> None:
    expected = [("devices", False, "1 GB free (rank 1)", "nvidia-smi names it"), ("clock", True, "", "")]
    assert run_ranks(2, devices) == [expected, expected]


def test_what_is_wrong_is_named_with_its_remedy(prefix: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    for suffix in (".bin", ".idx"):
        content = Path(f"{prefix}{suffix}").read_bytes()
        Path(f"{damaged}{suffix}").write_bytes(content[: len(content) // 2])
    words = [word for word in words_for(prefix) if not word.startswith("data.train")]
    done = launch("doctor", *words, f"data.train={damaged}", f"run.dir={tmp_path / 'file'}" + "/run")
    assert done.returncode == 1
    assert checks(done.stdout)["data.train"][0] == "FAIL"
    assert "remedy: prepare it again with launch/prepare_data.py" in done.stdout
    assert checks(done.stdout)["data.valid"][0] == "ok"
    done = launch("doctor", "configs/quickstart.yaml", "model.hiden_size=3")
    assert (done.returncode, checks(done.stdout)["config"][0]) == (1, "FAIL")
    assert "did you mean model.hidden_size?" in done.stdout
    done = launch("doctor", "configs/quickstart.yaml", "train.device=cpu", "parallel.tp=3")
    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert done.stdout.count("remedy: ") >= 1


@pytest.mark.parametrize(
    ("right", "speed", "gpus", "good", "said"),
    [
        (True, 0.1e9, False, True, ""),
        (True, 20e9, True, True, ""),
        (True, 1e9, True, False, "NCCL_DEBUG=INFO"),
        (False, 20e9, True, False, "corrupts data"),
    ],
)
def test_links_of_gpus_that_are_as_slow_as_sockets(right: bool, speed: float, gpus: bool, good: bool, said: str) -> None:
    check = doctor.judge_links(right, speed, "so fast", gpus)
    assert check.good is good
    assert good or said in check.remedy
    assert ("WRONG SUM" in check.found) is not right
