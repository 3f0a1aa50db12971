"""Run the launch scripts as people do, each rank a process of its own, without waiting for the imports every time.

The processes are forked from a server that has imported torch and moe_train and nothing more; each then runs the script as __main__ in
the repository's root. They can be killed like any other.
"""

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

ROOT = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["moe_train.train", "moe_train.generate", "torch._dynamo", "torch.utils.tensorboard", "moe_train.plots"]
)


class Launch:
    """`launch/SCRIPT.py WORDS` on `ranks` ranks."""

    def __init__(self, script: str, *words: str, ranks: int = 1) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="launch-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            arguments = (script, words, environment | place, str(self._log(rank)))
            self.processes.append(_context.Process(target=_run, args=arguments))
            self.processes[-1].start()

    def _log(self, rank: int, stream: str = "out") -> Path:
        return self.folder / f"{rank}.{stream}"

    def read(self, stream: str, rank: int = 0) -> str:
        """What a rank has written so far to `out` or `err`."""
        log = self._log(rank, stream)
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    @property
    def stdout(self) -> str:
        return self.read("out")

    @property
    def stderr(self) -> str:
        return "".join(self.read("err", rank) for rank in range(len(self.processes)))

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """End all ranks at once, as the system does that has no memory left."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, timeout: float = 240.0) -> int:
        """The exit status: that of the first rank that failed, or 0. A rank that goes on longer is killed and raises."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.0))
        if self.running:
            self.kill()
            raise TimeoutError(f"ranks ran longer than {timeout} s:\n{self.stdout[-2000:]}\n{self.stderr[-2000:]}")
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def launch(script: str, *words: str, ranks: int = 1) -> Launch:
    """Run a script to its end."""
    launched = Launch(script, *words, ranks=ranks)
    launched.returncode = launched.wait()
    return launched


def command(*words: str, ranks: int = 0) -> subprocess.CompletedProcess:
    """`python launch/pretrain.py WORDS` from nothing, or torchrun with `ranks`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    call = [sys.executable, *torchrun, "launch/pretrain.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)


def _run(script: str, words: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    os.environ |= environment
    os.chdir(ROOT)
    for number, path in ((1, log), (2, log.removesuffix("out") + "err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = sys.__stdin__ = open(os.devnull)  # noqa: SIM115
    sys.argv = [f"launch/{script}.py", *words]
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(sys.argv[0], run_name="__main__")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
