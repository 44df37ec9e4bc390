"""Benchmark the private step against plain training and Opacus ghost clipping, on the CPU.

    python bench_step.py --output core_step.json --plot core_step.svg

One round is one logical batch of four records per method, forward, backward, clipping, noise and
AdamW included. Methods take turns within a round; ratios are paired by round. A ratio compares
with plain training at the same micro-batch size: 1.0 means privacy costs no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contestants import BASELINES, METHODS, Shape
from report import plot, table
from rounds import check_agreement, machine, peak_memory, quartiles, throughput_ratio, time_rounds

QUICK = {"hidden": 64, "intermediate": 172, "layers": 2, "vocabulary": 256}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per record")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, help="timed rounds per length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--plot", type=Path, help="draw the results here; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="tiny model: does everything run?")
    options = parser.parse_args()
    options.lengths = options.lengths or ([64, 128] if options.quick else [1024, 4096])
    options.rounds = options.rounds or (2 if options.quick else 7)
    return options


def measure(shape: Shape, names: Sequence[str], options: argparse.Namespace) -> list[Any]:
    """Return one result per method at one length."""
    memory = {
        name: {"peak_mib": None} if options.no_memory else peak_memory(shape, name)
        for name in names
    }
    seconds = time_rounds(shape, names, options.rounds, lambda line: print(line, flush=True))
    return [
        {
            "length": shape.length,
            "method": name,
            "seconds": quartiles(seconds[name]),
            "throughput_ratio": throughput_ratio(seconds[name], seconds[BASELINES.get(name, name)]),
            "rounds": seconds[name],
            **memory[name],
        }
        for name in names
    ]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    chosen = {*options.methods, *(BASELINES[m] for m in options.methods if m in BASELINES)}
    if importlib.util.find_spec("opacus") is None:
        print("Opacus is not installed; it is left out. pip install opacus==1.6.0")
        chosen = {name for name in chosen if not name.startswith("opacus")}
    names = [name for name in METHODS if name in chosen]
    changes = QUICK if options.quick else {}
    check_agreement(Shape(length=33, **QUICK), names)
    results = []
    for length in options.lengths:
        results += measure(Shape(length=length, **changes), names, options)
    document = {
        "benchmark": "private step",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "model": dataclasses.asdict(Shape(length=max(options.lengths), **changes)),
        "results": results,
    }
    print(table(results))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n")
    if options.plot:
        plot(results, document["machine"], options.plot)


if __name__ == "__main__":
    main()
