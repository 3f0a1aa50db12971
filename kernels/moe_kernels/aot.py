"""What to compile ahead of time, and what came out: registers, stack, shared memory, operand rings and matrix instructions.

Every Triton module lists its kernels as `AOT_CASES`, so that a machine without a GPU can prove that each kernel, at each offered
configuration, compiles for each architecture without spills and within the chip's shared memory.

`python -m moe_kernels.aot [--arch 90] [filter ...]` compiles the cases whose module or name contains every filter and prints a table.
It must not run under TRITON_INTERPRET.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("permutation", "grouped_mm", "moe_mlp", "topk", "gru", "rms_norm", "rope", "swiglu", "cross_entropy")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may use
_SHARED_TOTAL = {
    80: 164 * 1024,
    90: 228 * 1024,
    100: 228 * 1024,
}  # bytes of a multiprocessor, of which a program costs 1 KB extra
_INSTRUCTIONS = {  # name -> its form in PTX; the group is what is shown
    "wgmma": r"wgmma\.mma_async\S*?(m\d+n\d+k\d+)",
    "mma.sync": r"\bmma\.sync\S*?(m\d+n\d+k\d+)",
    "tcgen05": r"tcgen05\.mma\S*?(kind::\w+)",
    "tma": r"cp\.async\.bulk\.tensor\.(\d)d",
    "cp.async": r"cp\.async\.c(\w)\.",
    "atomic": r"\b(?:atom|red)\.(?:\w+(?:::\w+)?\.)*(\w+)",
}


@dataclass(frozen=True)
class AotCase:
    """One compilation. `kernel` is a triton JITFunction; `types` names each non-constexpr argument's Triton type ("*bf16", "i32")."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = (80, 90, 100)
    piped_operands: int = 0  # operands of tl.dot that must go through the asynchronous load pipeline
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AotResult:
    """What the compiler made of a case."""

    registers: int  # per thread
    stack: int  # bytes per thread; more than zero is a spill
    local: int  # bytes per thread
    shared: int  # bytes per program
    threads: int  # per program, more than 32 * num_warps with warp specialisation
    ctas: int  # programs that fit a multiprocessor
    instructions: Mapping[str, str]  # matrix and copy instructions -> the shapes found
    rings: tuple[int, ...]  # stages of each operand buffer in the load pipeline
    loads: int  # loads of a tile left in the loop of the matrix product, which the pipeline does not serve
    seconds: float

    def failures(self, case: AotCase, arch: int) -> list[str]:
        """The rules that this result breaks; none is what a test wants."""
        expected, copies = _expected_instructions(case, arch), _expected_copies(case)
        deep = [stages for stages in self.rings if stages >= 2]
        rules = {
            f"stack {self.stack} B": self.stack > 0,
            f"local memory {self.local} B": self.local > 0,
            f"shared {self.shared} B is above {SHARED_LIMIT[arch]}": self.shared > SHARED_LIMIT[arch],
            f"{len(deep)} operands piped, expected {case.piped_operands}": len(deep) < case.piped_operands,
            f"{self.loads} operand loads left in the loop": case.piped_operands > 0 and self.loads > 0,
            f"atomic operations on {self.instructions.get('atomic')}": "atomic" in self.instructions,
            f"no {' or '.join(expected)}": case.piped_operands > 0 and not set(expected) & set(self.instructions),
            f"no {copies}": case.piped_operands > 0 and copies not in self.instructions,
        }
        return [rule for rule, broken in rules.items() if broken]

    def __str__(self) -> str:
        shapes = " ".join(f"{name}:{shape}" for name, shape in self.instructions.items())
        rings = "/".join(map(str, self.rings)) or "-"
        return (
            f"reg {self.registers:3d} stack {self.stack} local {self.local} shared {self.shared / 1024:5.1f} KB threads {self.threads}"
            f" ctas {self.ctas:2d} rings {rings} loads {self.loads} {self.seconds:4.1f} s  {shapes}"
        )


def _expected_instructions(case: AotCase, arch: int) -> tuple[str, ...]:
    """The architecture's own matrix instruction; on sm_90 and sm_100 it needs tiles of at least 64 rows."""
    if arch == 80:
        return ("mma.sync",)
    best = "wgmma" if arch == 90 else "tcgen05"
    rows = case.constexprs.get("BM", case.constexprs.get("BP", 0))
    return (best,) if rows >= 64 and case.num_warps >= 4 else (best, "mma.sync")


def _expected_copies(case: AotCase) -> str:
    """How operands get into shared memory: by the descriptors that a kernel is given or makes, else by cp.async."""
    given = any(kind.startswith("tensordesc") for kind in case.types.values())
    return "tma" if given or case.constexprs.get("SPECIALIZE") else "cp.async"


def compile_case(case: AotCase, arch: int) -> AotResult:
    """Compile `case` for sm_<arch> and read the result off the cubin, the PTX and the Triton GPU IR. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    if unknown := [name for name in names if name not in case.constexprs and name not in case.types]:
        raise KeyError(f"{case.name}: arguments without a type: {unknown}")
    signature = {name: "constexpr" if name in case.constexprs else case.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    registers, stack, local = _resources(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    found = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    threads = int(found.group(1)) if found else 32 * case.num_warps
    shared = compiled.metadata.shared
    return AotResult(
        registers=registers,
        stack=stack,
        local=local,
        shared=shared,
        threads=threads,
        ctas=_occupancy(registers, threads, shared, arch),
        instructions={
            name: "/".join(sorted(set(hits))) for name, form in _INSTRUCTIONS.items() if (hits := re.findall(form, ptx))
        },
        rings=tuple(
            int(n)
            for n in re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:\d+x)*(?:bf16|f16|f32)", ttgir)
        ),
        loads=_tile_loads(ttgir),
        seconds=seconds,
    )


def cases(*filters: str) -> Iterator[tuple[str, AotCase]]:
    """(module, case) of every Triton module whose "module name" contains every filter."""
    for module in MODULES:
        for case in getattr(importlib.import_module(f"moe_kernels.{module}.with_triton"), "AOT_CASES", ()):
            if all(word in f"{module} {case.name}" for word in filters):
                yield module, case


def _resources(cubin: bytes, cuobjdump: Path) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def _occupancy(registers: int, threads: int, shared: int, arch: int) -> int:
    if shared > SHARED_LIMIT[arch]:
        return 0
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, _SHARED_TOTAL[arch] // (shared + 1024), 2048 // threads, 32)


def _tile_loads(ttgir: str) -> int:
    """Loads of two-dimensional tensors in the innermost loops that hold a matrix product."""
    loads, stack = 0, []  # stack of (indent, loads, has a product, has an inner loop with one)
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            stack.append([indent, 0, False, False])
        elif stack and line.lstrip().startswith("}") and indent == stack[-1][0]:
            _, inside, product, inner = stack.pop()
            loads += inside if product and not inner else 0
            if stack and (product or inner):
                stack[-1][3] = True
        elif stack:
            stack[-1][1] += bool(re.search(r"= tt\.load .*tensor<\d+x\d+x!tt\.ptr", line))
            stack[-1][2] |= bool(re.search(r"(tt\.dot|warp_group_dot|tc_gen5_mma)\b", line))
    return loads


def _report(job: tuple[str, str, int]) -> tuple[bool, str]:
    """Compile the case called (module, name) for an arch; a process pool cannot pass a kernel, so it passes its name."""
    module, name, arch = job
    case = next(case for _, case in cases(module, name) if case.name == name)
    head = f"sm_{arch:<3d} {module:12s} {name:55s}"
    try:
        result = compile_case(case, arch)
    except Exception as error:  # a compiler failure is a row of the table, whatever its type
        return False, f"{head} FAILED {type(error).__name__}: {str(error)[:200]!r}"
    failures = result.failures(case, arch)
    return not failures, f"{head} {result}" + (f"  BROKEN: {'; '.join(failures)}" if failures else "")


def main() -> int:
    """Print the table; the exit status says whether every case kept the rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), help="default: every one the case names"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="leave out what no table chooses for the flagship shape")
    parser.add_argument("filter", nargs="*")
    args = parser.parse_args()
    chosen = [(m, c) for m, c in cases(*args.filter) if not args.fast or c.name.split()[0] not in ("table", "candidate")]
    jobs = [(m, c.name, arch) for m, c in chosen for arch in c.archs if not args.arch or arch in args.arch]
    kept = True
    with ProcessPoolExecutor(args.jobs) as pool:
        for ok, line in pool.map(_report, jobs):
            kept &= ok
            print(line, flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
