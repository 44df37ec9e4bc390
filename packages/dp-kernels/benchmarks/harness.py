"""Interleaved timing of one op against every other way to compute it, with its roofline.

Contestants take turns, call by call, so a shared or throttling machine slows all alike; ratios are
taken round by round. On a GPU the L2 cache is swept between calls and events give the time.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

from veilspan.kernels.roofline import DEVICES, Work

L2_BYTES = 256 * 2**20  # more than any cache


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of an op.

    Args:
        sizes: What identifies the case, such as `{"B": 1, "T": 4096}`.
        dtype: Dtype of the operands.
        work: FLOPs and bytes that the op cannot do without.
        contestants: Calls that compute the same; `veilspan` is ours.
    """

    sizes: Mapping[str, int]
    dtype: torch.dtype
    work: Work
    contestants: Mapping[str, Callable[[], object]]


Cases = Callable[[torch.device, bool], Iterator[Case]]


def main(op: str, cases: Cases) -> None:
    """Measure the cases of an op, print a table, and write JSON if asked.

    Args:
        op: Name of the op.
        cases: Returns the cases for a device; the flag asks for tiny ones.
    """
    parser = argparse.ArgumentParser(description=f"Time of {op} against its alternatives.")
    parser.add_argument("--output", type=Path, help="write JSON here")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0, help="most time for one case")
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    parser.add_argument("--until", type=float, default=math.inf, help="Unix time: no case after it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "benchmark": op,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "cases": [],
    }
    try:
        for case in cases(device, arguments.quick):
            if time.time() > arguments.until:
                result["stopped"] = "no time was left for further cases"
                break
            wanted = {n: call for n, call in case.contestants.items() if n not in arguments.without}
            case = replace(case, contestants=wanted)
            found = measure(case, device, rounds=arguments.rounds, seconds=arguments.seconds)
            print(table(found), flush=True)
            result["cases"].append(found)
            write(result, arguments.output)  # what comes after may fail, or be stopped
    except Exception as error:
        result["stopped"] = reason(error)
        raise
    finally:
        write(result, arguments.output)


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result as a whole or not at all, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)


def reason(error: Exception) -> str:
    """Return one line that says what went wrong."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def measure(case: Case, device: torch.device, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Return median seconds, rates and ratios of one case; what fails is recorded as such."""
    times: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    sweep = (
        torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if device.type != "cpu" else None
    )
    started = time.perf_counter()
    for number in range(rounds + 1):  # the first round compiles and warms up
        for name, call in case.contestants.items():
            if name in failures:
                continue
            try:
                elapsed = timed(call, sweep)
            except Exception as error:  # Triton's, of compiler and launch, are of no narrower class
                failures[name] = reason(error)
                times.pop(name, None)
                continue
            if number:
                times.setdefault(name, []).append(elapsed)
        if number and time.perf_counter() - started > seconds:
            break
    rows = {name: _row(spent, times.get("veilspan"), case.work) for name, spent in times.items()}
    forecast = {name: case.work.seconds(found) for name, found in DEVICES.items()}
    return {
        "sizes": dict(case.sizes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "flops": case.work.flops,
        "bytes": case.work.bytes,
        "forecast_seconds": forecast,
        "rows": rows,
        "failures": failures,
    }


def timed(call: Callable[[], object], sweep: torch.Tensor | None) -> float:
    """Return the seconds of one call; on a GPU with a cold cache."""
    if sweep is None:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    sweep.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000.0


def table(case: Mapping[str, Any]) -> str:
    """Return one case as text."""
    sizes = " ".join(f"{name}={size}" for name, size in case["sizes"].items())
    lines = [f"{sizes} {case['dtype']}"]
    for name, row in case["rows"].items():
        rates = f"{row['teraflops']:8.2f} TFLOP/s {row['gigabytes']:8.1f} GB/s"
        lines.append(f"  {name:28s} {row['seconds']:.3e} s {rates}  x{row['ratio']:.2f}")
    lines += [f"  {name:28s} {why}" for name, why in case["failures"].items()]
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what produced the numbers."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _row(spent: list[float], ours: list[float] | None, work: Work) -> dict[str, float]:
    seconds = statistics.median(spent)
    pairs = zip(ours or spent, spent, strict=False)
    return {
        "seconds": seconds,
        "teraflops": work.flops / seconds / 1e12,
        "gigabytes": work.bytes / seconds / 1e9,
        "ratio": statistics.median(theirs / mine for mine, theirs in pairs),
    }


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
