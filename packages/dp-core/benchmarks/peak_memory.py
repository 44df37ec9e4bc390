"""Print the peak memory of one method as JSON; run as a process of its own.

The figure is the growth of the process's resident high-water mark from the moment when model and
optimizer exist to the end of two logical batches, in MiB. It therefore holds the gradients, the
optimizer's state, activations and scratch memory of every method, but not the weights, the
interpreter or the libraries.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from pathlib import Path

import torch
from contestants import METHODS, Shape


def high_water_mib() -> float:
    """Return the largest resident size that this process ever had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent that started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--shape", type=json.loads, required=True, help="arguments of Shape")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(**options.shape)
    method = METHODS[options.method](shape, 1.0)
    gc.collect()
    before = high_water_mib()
    for number in range(2):
        method.gradient(shape.tokens(number))
        method.update()
    gradient = sum(p.numel() * p.element_size() for p in method.model.parameters()) / 2**20
    print(json.dumps({"peak_mib": high_water_mib() - before, "gradient_mib": gradient}))


if __name__ == "__main__":
    main()
