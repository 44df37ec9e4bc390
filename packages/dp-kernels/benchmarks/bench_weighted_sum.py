"""Sums over samples of stored gradients times factors: ours, einsum, and sample by sample.

    python bench_weighted_sum.py [--output FILE] [--quick]

A ratio is their time over ours. `einsum` rounds the factors to the dtype of the gradients first, so
its sum is not that of the clipped gradients; it is here for its speed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from veilspan.kernels import weighted_sum
from veilspan.kernels.ops.weighted_sum import work

LAYERS = [(512, 2048), (4096, 4096), (14336, 4096)]  # outputs and inputs of Llama layers


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    gpu = device.type == "cuda"
    layers = LAYERS if gpu else [(64, 256), (512, 512)]
    if quick:
        layers = [(16, 32)]
    for outputs, inputs in layers:
        for samples in (1, 4):
            yield case(samples, outputs, inputs, device)


def case(samples: int, outputs: int, inputs: int, device: torch.device) -> Case:
    """Return one layer for a number of samples."""
    grad_BOI = torch.randn(samples, outputs, inputs, device=device).bfloat16()
    factor_B = torch.rand(samples, device=device)
    total = torch.zeros(outputs, inputs, device=device)

    def one_by_one() -> object:
        for gradient, factor in zip(grad_BOI, factor_B, strict=True):
            torch.addcmul(total, gradient.float(), factor, out=total)
        return total

    return Case(
        sizes={"B": samples, "I": inputs, "O": outputs},
        dtype=torch.bfloat16,
        work=work(samples, outputs * inputs, add=True),
        contestants={
            "veilspan": lambda: weighted_sum(grad_BOI, factor_B, total=total),
            "einsum": lambda: total.add_(torch.einsum("b,boi->oi", factor_B.bfloat16(), grad_BOI)),
            "one by one": one_by_one,
        },
    )


if __name__ == "__main__":
    main("weighted_sum", cases)
