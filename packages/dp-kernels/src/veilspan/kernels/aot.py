"""Compile kernels for a GPU that is not here: registers, spills, shared memory, tensor cores.

python -m veilspan.kernels.aot --table sm_90 prints one row for each kernel and configuration of a
table, `--json` a list that a program can read; gfx942 stands for AMD GPUs, which take the default
table. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veilspan.kernels import ops
from veilspan.kernels.compat import AVAILABLE, INTERPRETED, triton
from veilspan.kernels.launch import ARCHITECTURES, Compilation

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Most shared memory of one program, bytes."""

_REGISTERS = 65536  # of one multiprocessor
_THREADS = 2048
_TENSOR_CORES = ("HGMMA", "HMMA", "DMMA", "v_mfma_f")
_LOADS = re.compile(r"\b(LDG(?:STS)?\.E)(?:\.(?:BYPASS|LTC128B))*((?:\.[US]?\d+)?)\b")
_AMD = "gfx942"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel needs.

    Args:
        registers: Registers of a thread.
        spills: Bytes that a thread spills to memory; 0 in a good kernel.
        shared: Shared memory of a program, bytes.
        warps: Warps of a program.
        occupancy: Threads resident on a multiprocessor over the most that there can be.
        tensor_cores: Tensor-core instructions in the machine code.
        loads: Kinds of loads from global memory; the fast ones end in 128, bits at once, and a loop
            that is pipelined has LDGSTS. Empty for AMD.
    """

    name: str
    registers: int
    spills: int
    shared: int
    warps: int
    occupancy: float
    tensor_cores: int
    loads: tuple[str, ...] = ()


def compilations(table: str) -> Iterator[Compilation]:
    """Yield every kernel of every op in every configuration of a table."""
    table = "default" if table == _AMD else table
    for module in pkgutil.iter_modules(ops.__path__):
        found = importlib.import_module(f"{ops.__name__}.{module.name}")
        if hasattr(found, "compilations"):
            yield from found.compilations(table)


def compiled(compilation: Compilation, table: str) -> Resources:
    """Compile for the GPUs of a table, `sm_80` or `sm_90`.

    Raises:
        RuntimeError: If Triton is missing or interprets its kernels, or the compiler says nothing.
    """
    read = _resources_of_amd if table == _AMD else _resources
    return read(compilation, _binary(compilation, table), table)


def assembly(compilation: Compilation, table: str) -> str:
    """Return the PTX of a kernel.

    Raises:
        RuntimeError: If Triton is missing or interprets its kernels.
    """
    return _binary(compilation, table).asm["ptx"]


def _binary(compilation: Compilation, table: str) -> Any:
    if not AVAILABLE or INTERPRETED:
        raise RuntimeError("compiling needs Triton, and TRITON_INTERPRET unset.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(compilation.kernel.arg_names)
    signature = {
        name: "constexpr" if name in compilation.constants else compilation.signature[name]
        for name in names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name] != "constexpr"
        and not signature[name].startswith("fp")
        and name not in compilation.odd
    }
    source = ASTSource(
        fn=compilation.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs=aligned,
    )
    if table == _AMD:
        target = GPUTarget("hip", table, 64)
    else:
        target = GPUTarget("cuda", int(table.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=compilation.chosen.options)


def _resources(compilation: Compilation, binary: Any, table: str) -> Resources:
    ptx: str = binary.asm["ptx"]
    found = re.search(r"\.target (\w+)", ptx)
    report = _assembler_report(ptx, found[1] if found else table)
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise RuntimeError(f"the assembler says nothing of {compilation.name}: {report}")
    code = _disassembled(binary.asm["cubin"])
    shared = int(binary.metadata.shared)
    warps = compilation.chosen.num_warps
    return Resources(
        name=compilation.label,
        registers=int(registers[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared=shared,
        warps=warps,
        occupancy=occupancy(int(registers[1]), shared, warps, table),
        tensor_cores=sum(len(re.findall(rf"\b{name}", code)) for name in _TENSOR_CORES),
        loads=tuple(sorted({"".join(found) for found in _LOADS.findall(code)})),
    )


def _resources_of_amd(compilation: Compilation, binary: Any, table: str) -> Resources:
    code: str = binary.asm["amdgcn"]
    counts = [
        max((int(count) for count in re.findall(rf"\.{name}:\s*(\d+)", code)), default=-1)
        for name in ("vgpr_count", "vgpr_spill_count")
    ]
    if min(counts) < 0:
        raise RuntimeError(f"the assembler says nothing of {compilation.name}")
    shared, warps = int(binary.metadata.shared), compilation.chosen.num_warps
    waves = min(512 // max(-(-counts[0] // 8) * 8, 8), 8)  # of a SIMD unit; there are four
    programs = 4 * waves // warps
    if shared:
        programs = min(programs, SHARED_LIMIT[table] // shared)
    return Resources(
        name=compilation.label,
        registers=counts[0],
        spills=counts[1],
        shared=shared,
        warps=warps,
        occupancy=programs * warps / 32,
        tensor_cores=sum(len(re.findall(rf"\b{name}", code)) for name in _TENSOR_CORES),
    )


def occupancy(registers: int, shared: int, warps: int, table: str) -> float:
    """Return resident threads over 2048, as registers and shared memory allow."""
    threads = 32 * warps
    granular = -(-registers // 8) * 8  # registers are given out in groups of eight
    programs = min(_REGISTERS // (granular * threads), _THREADS // threads, 32)
    if shared:
        programs = min(programs, (SHARED_LIMIT[table] + 1024) // (shared + 1024))
    return programs * threads / _THREADS


def _assembler_report(ptx: str, target: str) -> str:
    """Return what ptxas says; of two assemblers in the wheel, one may not read this PTX."""
    report = ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for name in ("ptxas", "ptxas-blackwell"):
            tool = _tool(name)
            if not tool.exists():
                continue
            command = [tool, "-v", f"-arch={target}", source, "-o", f"{folder}/kernel.cubin"]
            report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
            if "registers" in report:
                break
    return report


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def main() -> None:
    """Print the resources of every kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=(*ARCHITECTURES, _AMD), default="sm_90")
    parser.add_argument("--only", default="", help="names that begin with this")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [
        asdict(compiled(compilation, arguments.table))
        for compilation in compilations(arguments.table)
        if compilation.name.startswith(arguments.only)
    ]
    if arguments.json:
        json.dump(results, sys.stdout, indent=1)
        return
    for row in results:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
