"""Noise added in place: ours from two streams, and torch's own generator.

    python bench_add_noise.py [--output FILE] [--quick]

torch's generator is neither cryptographic nor independent of the sharding, and its tails end early;
it stands here as the price of plain random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from harness import Case, main

from veilspan.kernels import add_noise_
from veilspan.kernels.ops.add_noise import work
from veilspan.kernels.streams import STREAM_NAMES


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield one tensor per stream and dtype."""
    key = os.urandom(32)
    sizes = [2**28, 2**24] if device.type == "cuda" else [2**20]
    for elements in [2**12] if quick else sizes:
        for dtype in (torch.float32, torch.bfloat16):
            total = torch.zeros(elements, dtype=dtype, device=device)
            for stream in STREAM_NAMES:

                def ours(total: torch.Tensor = total, stream: str = stream) -> object:
                    return add_noise_(total, key=key, stddev=1.0, step=0, name="w", stream=stream)

                def theirs(total: torch.Tensor = total) -> object:
                    return total.add_(torch.randn_like(total))

                yield Case(
                    sizes={"elements": elements, stream: 1},
                    dtype=dtype,
                    work=work(elements, element_bytes=dtype.itemsize, stream=stream),
                    contestants={"veilspan": ours, "randn": theirs},
                )


if __name__ == "__main__":
    main("add_noise", cases)
