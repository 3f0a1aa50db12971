"""What a run must not do: write outside of its folder, keep secrets of the environment, listen to the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from audited import SECRETS
from corpora import write_corpus
from launches import ROOT, launch
from tiny_run import words_for

AUDITED = "../tests/faults/audited"
LISTENING = """
import os, re, socket, struct
from pathlib import Path
from moe_train.cli import parse
from moe_train.parallel.mesh import start_world
start_world(parse({"train": {"device": "cpu"}}, "test"))
mine = set()
for fd in os.listdir("/proc/self/fd"):
    try:
        mine |= set(re.findall(r"socket:\\[(\\d+)\\]", os.readlink(f"/proc/self/fd/{fd}")))
    except OSError:
        pass
for table in ("tcp", "tcp6"):
    for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in mine:
            raw = bytes.fromhex(fields[1].split(":")[0])
            words = b"".join(struct.pack("<I", int.from_bytes(raw[i : i + 4], "big")) for i in range(0, len(raw), 4))
            print("listens", socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words))
print("looked")
"""


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


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux tells which sockets a process has")
def test_a_process_listens_on_the_loopback_interface_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert "looked" in lines
    listening = {line for line in lines if line.startswith("listens")}
    assert listening
    assert listening <= {"listens 127.0.0.1", "listens ::1"}
