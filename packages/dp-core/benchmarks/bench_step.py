"""Benchmark the private step against plain training and Opacus ghost clipping, on the CPU.

    python bench_step.py --output core_step.json --plot core_step.svg

One round is one logical batch of 16,384 tokens per method: forward, backward, clipping, noise and
AdamW included, so a record of 1,024 tokens shares the cost of the noise with fifteen others.
Methods take turns within a round; ratios are paired by round. A ratio compares with plain training
at the same micro-batch size: 1.0 means privacy costs no time. `best` compares with the faster of
the plain methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contestants import BASELINES, METHODS, QUICK, Shape, without_opacus
from report import plot, table
from rounds import check_agreement, document, quartiles, throughput_ratio, time_rounds, write

TOKENS = 16_384


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per record")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, help="timed rounds per length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--plot", type=Path, help="draw the results here; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="tiny model: does everything run?")
    options = parser.parse_args()
    options.lengths = options.lengths or ([64, 128] if options.quick else [1024, 4096])
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def measure(shape: Shape, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Return one result per method at one length."""
    seconds = time_rounds(shape, names, rounds, lambda line: print(line, flush=True))
    baselines = [seconds[name] for name in names if name.startswith("plain")]
    plain = [min(together) for together in zip(*baselines, strict=True)]
    return [
        {
            "length": shape.length,
            "records": shape.records,
            "method": name,
            "seconds": quartiles(seconds[name]),
            "throughput_ratio": throughput_ratio(seconds[name], seconds[BASELINES.get(name, name)]),
            "best_ratio": throughput_ratio(seconds[name], plain),
            "rounds": seconds[name],
        }
        for name in names
    ]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    chosen = {*options.methods, *(BASELINES[m] for m in options.methods if m in BASELINES)}
    names = without_opacus([name for name in METHODS if name in chosen])
    changes = QUICK if options.quick else {}
    check_agreement(Shape(length=33, **QUICK), names)
    results = []
    for length in options.lengths:
        records = 4 if options.quick else max(4, TOKENS // length)
        results += measure(Shape(length=length, records=records, **changes), names, options.rounds)
    result = document("private step", results, changes)
    print(table(results))
    write(result, options.output)
    if options.plot:
        plot(results, result["machine"], options.plot)


if __name__ == "__main__":
    main()
