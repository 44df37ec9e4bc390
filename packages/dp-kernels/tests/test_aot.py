"""Every kernel compiled for GPUs that are not here: no spills, shared memory and occupancy as ever.

After a deliberate change write the record anew:

    python packages/dp-kernels/tests/test_aot.py
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veilspan.kernels.aot import SHARED_LIMIT, occupancy
from veilspan.kernels.launch import ARCHITECTURES

TABLES = (*ARCHITECTURES, "gfx942")
RECORD = Path(__file__).with_name("compiled.json")


def compile_all(table: str) -> dict[str, dict[str, Any]]:
    """Compile in a process of its own, where Triton does not interpret."""
    command = [sys.executable, "-m", "veilspan.kernels.aot", "--table", table, "--json"]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    rows = json.loads(printed.stdout)
    found = {row.pop("name"): row for row in rows}
    assert len(found) == len(rows), "two compilations share a name"
    return found


@pytest.mark.parametrize("table", TABLES)
def test_kernels_need_no_more_than_recorded(table: str) -> None:
    triton, record = pytest.importorskip("triton"), json.loads(RECORD.read_text())
    recorded, found = record[table], compile_all(table)
    same_triton = triton.__version__ == record["triton"]
    assert recorded.keys() == found.keys(), "write the record anew, see above"
    for name, row in found.items():
        assert row["spills"] == 0, f"{name} spills {row['spills']} bytes a thread"
        assert row["shared"] <= SHARED_LIMIT[table], f"{name} does not fit"
        if same_triton:  # another one needs other numbers of registers
            assert row["occupancy"] >= recorded[name]["occupancy"], f"{name} fits fewer threads"
            assert row["loads"] == recorded[name]["loads"], f"{name} loads otherwise"
        assert bool(row["tensor_cores"]) == bool(recorded[name]["tensor_cores"]), name


@pytest.mark.parametrize("table", ARCHITECTURES)
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        *((f"accumulate {kind}", "LDG.E.128") for kind in ("norm", "fp32", "int64")),
        ("embedding_inner", "LDG.E.128"),
        *((op, "LDGSTS.E.128") for op in ("direct_norm bf16 128x128", "gram_norm bf16 128")),
    ],
)
def test_aligned_operands_are_loaded_128_bits_at_once(table: str, start: str, kind: str) -> None:
    record = json.loads(RECORD.read_text())[table]
    found = [set(row["loads"]) for name, row in record.items() if name.startswith(start)]
    assert found
    assert all(kind in loads for loads in found)
    if kind.startswith("LDGSTS"):  # every operand comes through the pipeline
        assert all(loads == {kind} for loads in found)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(32, 0, 8, 1.0), (255, 0, 8, 0.125), (168, 96 * 1024, 8, 0.125), (64, 0, 4, 0.5)],
)
def test_occupancy_follows_registers_and_shared_memory(
    registers: int, shared: int, warps: int, expected: float
) -> None:
    assert occupancy(registers, shared, warps, "sm_90") == expected


if __name__ == "__main__":
    tables = {table: compile_all(table) for table in TABLES}
    record = {"triton": importlib.metadata.version("triton"), **tables}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
