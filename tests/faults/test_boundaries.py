"""What a run must not do: write outside of its folder, keep secrets of the environment, listen to the network."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from audited import SECRETS
from corpora import write_corpus
from launches import ROOT, launch
from tiny_run import words_for
from torchruns import Torchrun

AUDITED = "../tests/faults/audited"
LOOPBACK = {"127.0.0.1", "::1"}
ALONE = """
from moe_train.cli import parse
from moe_train.parallel.mesh import start_world
start_world(parse({"train": {"device": "cpu"}}, "test"))
print("ready", flush=True)
input()
"""
LINUX = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux tells which sockets a process has")


def listening(*processes: int) -> set[str]:
    """The addresses on which processes listen, from /proc."""
    own, found = set(), set()
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                own |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(struct.pack("<I", int.from_bytes(raw[i : i + 4], "big")) for i in range(0, len(raw), 4))
                found.add(socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words))
    return found


def test_a_run_writes_into_its_folder_alone_and_keeps_no_secret(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "text")
    run, listed = tmp_path / "run", tmp_path / "listed"
    hostile = ["sample.prompt=../../outside", "monitor.wandb_project=../../outside", "optim.lr=1e30", "optim.warmup_steps=0"]
    done = launch(AUDITED, str(listed), *words_for(prefix), *hostile, "optim.clip_norm=null", f"run.dir={run}")
    assert done.returncode == 2, done.stderr  # steps that are not finite: bundles and logs of faults are written, too
    assert (run / "faults" / "step-00000004").is_dir()
    written = {Path(line) for line in listed.read_text().splitlines()}
    assert run / "metrics.jsonl" in written
    outside = {path for path in written if not path.is_relative_to(run)} - {Path("/dev/null"), tmp_path}
    outside = {path for path in outside if "__pycache__" not in path.parts and not path.is_relative_to("/proc")}
    assert not outside
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert len(kept) > 10
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        assert not [path for path in kept if secret.encode() in path.read_bytes()]


@LINUX
def test_a_rank_without_torchrun_listens_on_the_loopback_interface_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # it holds the store
    call = [sys.executable, "-c", ALONE]
    with subprocess.Popen(call, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = listening(process.pid)
        process.communicate("\n", timeout=60)
    assert found
    assert found <= LOOPBACK


@LINUX
def test_torchrun_and_its_ranks_listen_on_the_loopback_interface_alone(tmp_path: Path, started: list[Torchrun]) -> None:
    words = [
        *words_for(write_corpus(tmp_path / "text")),
        "train.steps=100000",
        "train.device=cpu",
        f"run.dir={tmp_path / 'run'}",
    ]
    run = Torchrun(tmp_path / "out", "--rdzv-backend=private", "--nproc-per-node=2", words=words)
    started.append(run)
    run.wait_for(r"^step +5/")
    tree = run.tree()
    assert len(tree) >= 3
    assert listening(run.process.pid)  # the agent has the store
    assert listening(*tree) <= LOOPBACK
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(60)
    assert re.search(r"^stopped by SIGTERM at step \d+; the same command goes on$", run.said, re.MULTILINE)
