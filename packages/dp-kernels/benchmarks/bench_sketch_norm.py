"""Norms estimated from 64 probes: ours against the exact norm, and the two thin products alone.

    python bench_sketch_norm.py [--output FILE] [--quick]

A ratio is their time over ours. `products alone` has its probes given.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from veilspan.kernels import Probes, direct_norm, sketch_norm
from veilspan.kernels.ops.sketch_norm import work

LLAMA = {"1b k": (2048, 512), "1b down": (8192, 2048), "8b q": (4096, 4096), "8b up": (4096, 14336)}
LENGTHS = [(1, 4096), (1, 16384)]  # samples and tokens
KEY = bytes(range(32))  # of a benchmark: nothing here is secret


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    gpu = device.type == "cuda"
    layers = list(LLAMA.values()) if gpu else [(256, 256), (1024, 1024)]
    lengths = LENGTHS if gpu else [(1, 1024), (1, 4096)]
    if quick:
        layers, lengths = [(32, 16)], [(2, 8)]
    dtype = torch.bfloat16 if gpu else torch.float32
    for inputs, outputs in layers:
        for samples, tokens in lengths:
            act_BTI = torch.randn(samples, tokens, inputs, device=device).to(dtype)
            grad_BTO = torch.randn(samples, tokens, outputs, device=device).to(dtype)
            yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype = grad_BTO.shape[2], act_BTI.dtype
    probes = Probes(key=KEY, step=0, name="layer", per_sample=False)
    again = Probes(key=KEY, step=0, name="layer", per_sample=False, stored=False)
    given = probes.rows(0, outputs, outputs, act_BTI.device).to(dtype)

    def products() -> object:
        return (act_BTI.mT @ (grad_BTO @ given)).float().square().sum((1, 2))

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(samples, tokens, inputs, outputs, operand_bytes=dtype.itemsize),
        contestants={
            "veilspan": lambda: sketch_norm(act_BTI, grad_BTO, probes),
            "drawn again": lambda: sketch_norm(act_BTI, grad_BTO, again),
            "direct_norm": lambda: direct_norm(act_BTI, grad_BTO),
            "products alone": products,
        },
    )


if __name__ == "__main__":
    main("sketch_norm", cases)
