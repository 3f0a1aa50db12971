"""Every kernel, at every config that a table offers, compiles for every architecture: no spills, piped operands, the right instruction.

Compilation needs real Triton and this process may run its interpreter, so one subprocess compiles and each test reads its line.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from moe_kernels.aot import _INSTRUCTIONS, SHARED_LIMIT, AotCase, AotResult, _tile_loads, cases

_JOBS = [(module, case.name, arch) for module, case in cases() for arch in case.archs]


def is_fast(job):
    """What the tables choose for the flagship shape on the two architectures that we run on; the rest is slow."""
    _, name, arch = job
    return arch in (80, 90) and name.split()[0] not in ("table", "candidate")


def compile_lines(*arguments):
    """The table's lines by (architecture, module, name)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe_kernels.aot", "--jobs", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    table = {}
    for line in done.stdout.splitlines():
        if line.startswith("sm_"):
            arch, module, rest = line[3:].split(maxsplit=2)
            table[int(arch), module] = [*table.get((int(arch), module), []), rest]
    assert table, done.stderr[-2000:]
    return table


@pytest.fixture(scope="session")
def fast_table():
    return compile_lines("--arch", "80", "--arch", "90", "--fast")


@pytest.fixture(scope="session")
def full_table():
    return compile_lines()


def check(table, module, name, arch):
    (line,) = (line for line in table[arch, module] if line.startswith(f"{name} "))
    assert "FAILED" not in line, line
    assert "BROKEN" not in line, line


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("module", "name", "arch"), [job for job in _JOBS if is_fast(job)])
def test_compiles(module, name, arch, fast_table):
    check(fast_table, module, name, arch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("module", "name", "arch"), [job for job in _JOBS if not is_fast(job)])
def test_compiles_everything_offered(module, name, arch, full_table):
    check(full_table, module, name, arch)


def result(**changes):
    good = {
        "registers": 128,
        "stack": 0,
        "local": 0,
        "shared": 1024,
        "threads": 256,
        "ctas": 1,
        "instructions": {"wgmma": "m64n128k16", "cp.async": "g"},
    }
    return AotResult(**(good | {"rings": (3, 3), "loads": 0, "seconds": 1.0} | changes))


def test_the_rules_find_each_failure():
    case = AotCase("case", None, {}, {"BM": 128}, num_warps=8, num_stages=3, piped_operands=2)
    assert result().failures(case, 90) == []
    for changes, failure in (
        ({"stack": 8}, "stack 8 B"),
        ({"local": 16}, "local memory 16 B"),
        ({"shared": SHARED_LIMIT[90] + 1}, "shared"),
        ({"rings": (3, 1)}, "1 operands piped, expected 2"),
        ({"loads": 1}, "1 operand loads left in the loop"),
        ({"instructions": {"mma.sync": "m16n8k16", "cp.async": "g"}}, "no wgmma"),
        ({"instructions": {"wgmma": "m64n128k16", "tma": "2"}}, "no cp.async"),
        ({"instructions": {"wgmma": "m64n128k16", "cp.async": "g", "atomic": "f32"}}, "atomic operations on f32"),
    ):
        (found,) = result(**changes).failures(case, 90)
        assert failure in found
    assert result(instructions={"mma.sync": "m16n8k16", "cp.async": "g"}).failures(case, 80) == []
    described = replace(case, types={"rows": "tensordesc<bf16[128,64]>"})
    assert result().failures(described, 90) == ["no tma"]
    assert result(instructions={"wgmma": "m64n128k16", "tma": "2"}).failures(described, 90) == []


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", ["f32"]),
        ("@%p1 red.global.add.f32 [%rd1], %f2;", ["f32"]),
        ("atom.shared::cta.add.u32 %r1, [%r2], 1;", ["u32"]),
        ("redux.sync.add.s32 %r1, %r2, -1; mbarrier.try_wait.parity.shared.b64 %p, [%r1], %r2;", []),
    ],
)
def test_atomics_are_seen(ptx, found):
    assert re.findall(_INSTRUCTIONS["atomic"], ptx) == found


def test_a_load_left_in_the_loop_is_counted():
    ir = """
    %0 = tt.load %p : tensor<128x64x!tt.ptr<bf16>, #blocked>
    scf.for %i = %a to %b step %c {
      %1 = tt.load %q : tensor<128x64x!tt.ptr<bf16>, #blocked>
      scf.for %j = %a to %b step %c {
        %2 = tt.load %q : tensor<128x64x!tt.ptr<bf16>, #blocked>
        %3 = tt.load %r : tensor<128x!tt.ptr<i32>, #blocked>
        %4 = tt.dot %2, %5, %6 : tensor<128x64xbf16>
      }
    }
    """
    assert _tile_loads(ir) == 1
