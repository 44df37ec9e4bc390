"""Measure the peak memory of the private step, plain training and Opacus, a process for each.

    python bench_memory.py --output core_memory.json

The figure is the growth of the process's resident high-water mark from the moment when model and
optimizer exist to the end of two logical batches, in MiB. It therefore holds the gradients, the
optimizer's state, activations and scratch memory of every method, but not the weights, the
interpreter or the libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from contestants import METHODS, QUICK, Shape, without_opacus
from rounds import document, write


def high_water_mib() -> float:
    """Return the largest resident size that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent that started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure_here(shape: Shape, name: str) -> dict[str, float]:
    """Return the peak and the size of one gradient of this process, MiB."""
    method = METHODS[name](shape, 1.0)
    gc.collect()
    before = high_water_mib()
    for number in range(2):
        method.gradient(shape.tokens(number))
        method.update()
    gradient = sum(p.numel() * p.element_size() for p in method.model.parameters()) / 2**20
    return {"peak_mib": high_water_mib() - before, "gradient_mib": gradient}


def measure_apart(shape: Shape, name: str, threads: int) -> dict[str, float]:
    """Return what `measure_here` returns in a process of its own."""
    command = [sys.executable, __file__, "--here", name, "--threads", str(threads)]
    command += ["--shape", json.dumps(dataclasses.asdict(shape))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens per record")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny model: does everything run?")
    parser.add_argument("--here", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(measure_here(Shape(**options.shape), options.here)))
        return
    lengths = options.lengths or ([64, 128] if options.quick else [1024, 4096])
    changes = QUICK if options.quick else {}
    results = []
    print(f"{'T':>6} {'method':<20} {'peak MiB':>9} {'gradient MiB':>13}")
    for length in lengths:
        shape = Shape(length=length, **changes)
        for name in without_opacus(options.methods):
            found = measure_apart(shape, name, options.threads)
            results.append({"length": length, "method": name, **found})
            peak, gradient = found["peak_mib"], found["gradient_mib"]
            print(f"{length:>6} {name:<20} {peak:>9.0f} {gradient:>13.0f}", flush=True)
    write(document("peak memory of the private step", results, changes), options.output)


if __name__ == "__main__":
    main()
