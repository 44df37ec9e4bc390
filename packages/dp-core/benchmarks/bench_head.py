"""Measure the fused head against the loss of the logits: time, and peak memory in its own process.

    python bench_head.py --output core_head.json

The model is one linear layer below a head, so that the figures are the head's: its forward pass,
loss and gradient of one micro-batch. A method is a loss (`logits` or `fused`) under a backward
strategy (`plain` is autograd without privacy). Methods take turns within a round; the ratio is
seconds of `logits` over seconds of `fused` under the same strategy, paired by round. Peak memory is
the growth of the process's resident high-water mark over two micro-batches, in MiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from memory import high_water_mib
from rounds import machine, quartiles, throughput_ratio, write
from torch import Tensor, nn

from veilspan.core import Flat, PrivateStep
from veilspan.core.head import head_losses
from veilspan.core.losses import causal_lm_losses

STRATEGIES = ("plain", "per_sample", "bookkeeping", "two_pass")
METHODS = [f"{loss} {strategy}" for strategy in STRATEGIES for loss in ("logits", "fused")]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The head, plus the micro-batch."""

    vocabulary: int
    records: int = 2
    length: int = 2048
    hidden: int = 512


class Top(nn.Module):
    """The last linear layer of a decoder, with its head left to the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.below = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.below(hidden)


def run_of(shape: Shape, name: str) -> Callable[[], None]:
    """Return a function that leaves the gradient of one micro-batch in `.grad`."""
    loss, strategy = name.split()
    torch.manual_seed(0)
    model = Top(shape)
    hidden = torch.randn(shape.records, shape.length, shape.hidden)
    labels = torch.randint(shape.vocabulary, (shape.records, shape.length))

    def losses() -> Tensor:
        top = model(hidden)
        if loss == "fused":
            return head_losses(top, model.head, labels)
        return causal_lm_losses(model.head(top), labels)

    if strategy == "plain":

        def plain() -> None:
            model.zero_grad()
            losses().sum().backward()

        return plain
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        backward=strategy,
    )

    def private() -> None:
        model.zero_grad()
        with step:
            step.backward(losses())

    return private


def measure_here(shape: Shape, name: str) -> float:
    """Return the peak of two micro-batches in this process, MiB."""
    run = run_of(shape, name)
    gc.collect()
    before = high_water_mib()
    for _ in range(2):
        run()
    return high_water_mib() - before


def measure_apart(shape: Shape, name: str, threads: int) -> float:
    """Return what `measure_here` returns in a process of its own."""
    command = [sys.executable, __file__, "--here", name, "--threads", str(threads)]
    command += ["--shape", json.dumps(dataclasses.asdict(shape))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def time_rounds(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round, for each method; a round before the first warms up."""
    runs = {name: run_of(shape, name) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(-1, rounds):
        turn = number % len(METHODS)
        for name in (*METHODS[turn:], *METHODS[:turn]):
            start = time.perf_counter()
            runs[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(shape: Shape, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return one result per method at one vocabulary."""
    seconds = time_rounds(shape, rounds)
    logits_mib = 4 * shape.records * shape.length * shape.vocabulary / 2**20
    return [
        {
            **dataclasses.asdict(shape),
            "method": name,
            "seconds": quartiles(seconds[name]),
            "throughput_ratio": throughput_ratio(
                seconds[name], seconds[f"logits {name.split()[1]}"]
            ),
            "peak_mib": measure_apart(shape, name, threads),
            "logits_mib": logits_mib,
        }
        for name in METHODS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, help="timed rounds per vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny head: does everything run?")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(measure_here(Shape(**options.shape), options.here)))
        return
    quick = {"length": 512, "hidden": 64} if options.quick else {}
    vocabularies = options.vocabularies or ([4096, 16384] if options.quick else [8192, 32768])
    rounds = options.rounds or (2 if options.quick else 5)
    results = []
    print(f"{'V':>7} {'method':<20} {'seconds':>8} {'ratio':>6} {'peak MiB':>9} {'logits MiB':>11}")
    for vocabulary in vocabularies:
        for row in measure(Shape(vocabulary=vocabulary, **quick), rounds, options.threads):
            results.append(row)
            median, ratio = row["seconds"]["median"], row["throughput_ratio"]["median"]
            print(
                f"{vocabulary:>7} {row['method']:<20} {median:>8.3f} {ratio:>6.2f} "
                f"{row['peak_mib']:>9.0f} {row['logits_mib']:>11.0f}",
                flush=True,
            )
    result = {
        "benchmark": "fused linear and cross-entropy head",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "results": results,
    }
    write(result, options.output)


if __name__ == "__main__":
    main()
