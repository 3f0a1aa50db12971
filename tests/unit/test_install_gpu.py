"""docker/install_gpu.sh on a machine that is made up: what it refuses, what it builds, with which flags, in which order."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "install_gpu.sh"
PYTHON = """
echo "$* [$TORCH_CUDA_ARCH_LIST|$FLASH_ATTN_CUDA_ARCHS|$MAX_JOBS|${GROUPED_GEMM_CUTLASS:-}]" >>"$LOG"
case "$*" in
*torch.__version__*) echo "$TORCH_HERE" ;;
*torch.version.cuda*) echo "$CUDA_HERE" ;;
*get_device_capability*) echo "$GPUS_HERE" ;;
*"$BROKEN"*) exit 1 ;;
esac
"""
PROGRAMS = {
    "python": PYTHON,
    "nvcc": 'echo "Cuda compilation tools, release $NVCC_HERE, V1"',
    "df": "echo Avail; echo $DISK_HERE",
    "awk": "echo $MEMORY_HERE",
    "nproc": "echo 16",
}
MACHINE = {
    "TORCH_HERE": "2.13.0+cu130", "CUDA_HERE": "13.0", "NVCC_HERE": "13.0", "GPUS_HERE": "8.0", "DISK_HERE": "100", "MEMORY_HERE": "64",
    "BROKEN": "nothing is",
}  # fmt: skip


@pytest.fixture
def install(tmp_path: Path):
    """Runs the script: what it says, and the commands of its Python."""
    for name, text in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{text}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(*parts: str, **machine: str) -> tuple[int, str, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
        path = f"{tmp_path}:{os.environ['PATH']}"
        env = {**kept, **MACHINE, **machine, "PATH": path, "LOG": str(log)}
        done = subprocess.run([str(SCRIPT), *parts], env=env, capture_output=True, text=True, timeout=60)
        commands = [line for line in log.read_text().splitlines() if "pip install" in line or "import_module" in line]
        return done.returncode, done.stdout + done.stderr, commands

    return run


def test_what_is_built_on_a100s(install) -> None:
    code, said, commands = install()
    assert code == 0, said
    flags = "-m pip install --no-deps --no-build-isolation"
    ends = "[8.0|80|10|]"  # 64 GB for compilers of 6 GB
    assert commands[1:4] == [
        f"{flags} stanford-stk==0.7.1 {ends}",
        f"{flags} grouped_gemm==0.3.0 [8.0|80|10|1]",
        f"{flags} megablocks==0.10.0 {ends}",
    ]
    assert "megablocks.grouped_gemm_util" in commands[5]
    assert commands[6] == f"{flags} flash-attn==2.8.3.post2 {ends}"
    assert "flash_attn_varlen_func" in commands[7]
    assert len(commands) == 8


def test_hopper_gets_flash3_too(install) -> None:
    code, said, commands = install(TORCH_CUDA_ARCH_LIST="8.0 9.0", MAX_JOBS="3")
    assert code == 0, said
    assert "hopper [8.0 9.0|80;90|3|]" in commands[-2]
    assert "flash_attn_3.flash_attn_interface" in commands[-1]


def test_parts_by_name(install) -> None:
    code, said, commands = install("flash2")
    assert code == 0, said
    assert len(commands) == 3  # build tools, flash2, its import


@pytest.mark.parametrize(
    ("parts", "machine", "message"),
    [
        (["apex"], {}, "apex is unknown"),
        ([], {"TORCH_HERE": "2.9.1"}, "torch is 2.9.1; these versions were chosen for torch 2.13"),
        ([], {"CUDA_HERE": ""}, "was built without CUDA"),
        ([], {"NVCC_HERE": "12.8"}, "nvcc is of CUDA 12.8, and torch was built for CUDA 13.0"),
        ([], {"CUDA_HOME": "/nowhere"}, "/nowhere/bin/nvcc was not found"),
        ([], {"GPUS_HERE": ""}, "set TORCH_CUDA_ARCH_LIST"),
        ([], {"TORCH_CUDA_ARCH_LIST": "7.5"}, "7.5 is not a capability of 8.0 or more"),
        (["flash3"], {}, "flash3 is for Hopper"),
        ([], {"DISK_HERE": "3"}, "has 3 GB left and builds need 20"),
        ([], {"MEMORY_HERE": "4"}, "4 GB of memory are free"),
        ([], {"MAX_JOBS": "many"}, "MAX_JOBS=many must be a number"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_installed(install, parts, machine, message: str) -> None:
    code, said, commands = install(*parts, **machine)
    assert code == 1
    assert message in said
    assert not [c for c in commands if "--no-deps" in c]


def test_a_build_or_an_import_that_fails_ends_it(install) -> None:
    code, said, commands = install(BROKEN="grouped_gemm==")
    assert (code, len(commands)) == (1, 3)
    assert "grouped_gemm==0.3.0 was not built" in said
    code, said, _ = install("flash2", BROKEN="flash_attn_varlen_func")
    assert code == 1
    assert "flash_attn was built and cannot be imported" in said
