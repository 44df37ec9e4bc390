"""Benchmark Opacus ghost clipping with its own norms and with ours, on the CPU.

    python bench_opacus.py --output core_opacus.json

One round is one logical batch per method, in micro-batches of two records: forward, backward,
clipping, noise and AdamW included. Methods take turns within a round, and the speed-up is paired by
round. Peak memory comes from a process for each method.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from contestants import why_absent
from memory import peak_mib
from models import QUICK, Shape
from rounds import Limits, gradient_errors, machine, quartiles, time_rounds, today, write

THEIRS, OURS, SIZE = "opacus_ghost", "opacus_bridged", 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per record")
    parser.add_argument("--rounds", type=int, help="timed rounds per length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny model: does everything run?")
    options = parser.parse_args()
    options.lengths = options.lengths or ([64, 128] if options.quick else [256, 1024, 4096])
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def measure(shape: Shape, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return one result per method at one length."""
    contestants = {name: (name, SIZE) for name in (THEIRS, OURS)}
    times = time_rounds(
        shape, contestants, Limits(rounds=rounds), lambda line: print(line, flush=True)
    )
    if times.failures:
        raise RuntimeError(f"Opacus failed: {times.failures}")
    return [
        {
            "length": shape.length,
            "records": shape.records,
            "method": name,
            "seconds": quartiles(list(times.settled(name).values())),
            "speed_up": quartiles(times.paired(name, THEIRS)),
            "rounds": list(times.settled(name).values()),
            "peak_mib": peak_mib(shape, name, SIZE, threads),
        }
        for name in (THEIRS, OURS)
    ]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if why := why_absent(THEIRS):
        print(f"Left out: {why}. pip install opacus==1.6.0")
        return
    changes = QUICK if options.quick else {}
    gradient_errors(Shape(length=33, **QUICK), [THEIRS, OURS], SIZE)
    results = []
    for length in options.lengths:
        results += measure(Shape(length=length, **changes), options.rounds, options.threads)
    print(f"{'T':>6} {'method':<18} {'s':>8} {'speed-up':>9} {'peak MiB':>9}")
    for row in results:
        print(
            f"{row['length']:>6} {row['method']:<18} {row['seconds']['median']:>8.2f} "
            f"{row['speed_up']['median']:>9.2f} {row['peak_mib']:>9.0f}"
        )
    result = {
        "benchmark": "Opacus ghost clipping with our norms",
        "date": today(),
        "machine": machine(),
        "model": dataclasses.asdict(Shape(length=max(options.lengths), **changes)),
        "results": results,
    }
    write(result, options.output)


if __name__ == "__main__":
    main()
