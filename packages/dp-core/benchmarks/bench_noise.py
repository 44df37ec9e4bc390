"""Benchmark the noise sources: normals per second, beside torch's own generator.

    python bench_noise.py --output core_noise.json

torch's generator is neither cryptographic nor independent of the sharding, and its tails end early;
it stands here as the price of plain random numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rounds import machine, quartiles
from torch import Tensor

from veilspan.core.noise import GaussianNoise, PhiloxNoise, new_key


def sources() -> dict[str, Callable[[Tensor, int], object]]:
    """Return ways to add noise to a tensor at a step."""
    aes, philox = GaussianNoise(new_key()), PhiloxNoise(new_key())
    return {
        aes.stream_name: lambda x, step: aes.add_(x, stddev=1.0, step=step, name="x", offset=0),
        philox.stream_name: lambda x, step: philox.add_(
            x, stddev=1.0, step=step, name="x", offset=0
        ),
        "torch.normal": lambda x, step: x.add_(torch.randn_like(x)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--elements", type=int, help="size of the fp32 tensor")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--quick", action="store_true", help="small: does everything run?")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 11)
    total = torch.zeros(options.elements or (200_000 if options.quick else 10_000_000))
    contestants, results = sources(), []
    for threads in options.threads:
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for step in range(rounds + 1):  # the first one warms up
            for name, add in contestants.items():
                start = time.perf_counter()
                add(total, step)
                seconds[name].append(time.perf_counter() - start)
        for name, taken in seconds.items():
            rate = quartiles([total.numel() / s / 1e6 for s in taken[1:]])
            results.append({"source": name, "threads": threads, "million_per_second": rate})
            print(f"{name:<16} {threads} threads {rate['median']:8.1f} million normals/s")
    if options.output:
        document = {"benchmark": "noise", "machine": machine(), "results": results}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
