"""Norms estimated from 64 probes: ours against the exact norm, and the two thin products alone.

    python bench_sketch_norm.py [--output FILE] [--quick]

A ratio is their time over ours. `products alone` has its probes given.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import Probes, direct_norm, sketch_norm
from veilspan.kernels.ops.sketch_norm import work

LENGTHS = [(1, 4096), (1, 16384)]  # samples and tokens
KEY = bytes(range(32))  # of a benchmark: nothing here is secret


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS):
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
