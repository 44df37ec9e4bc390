"""Norms of per-sample gradients of a linear map: ours, one big product, one product per sample.

    python bench_direct_norm.py [--output FILE] [--quick]

A ratio is their time over ours. `bmm` stores the gradients of all samples in bf16 and takes the
norm of what it stored; `product alone` is the product without a norm, which bounds what can be had.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import direct_norm
from veilspan.kernels.ops.direct_norm import work

LENGTHS = [(4, 512), (1, 2048), (1, 8192)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS):
        yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype = grad_BTO.shape[2], act_BTI.dtype

    def norms(grad_BOI: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(grad_BOI, dim=(1, 2), dtype=torch.float32).square()

    def one_by_one() -> object:
        return [norms((g.mT @ a)[None]) for a, g in zip(act_BTI, grad_BTO, strict=True)]

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(samples, tokens, inputs, outputs, operand_bytes=dtype.itemsize),
        contestants={
            "veilspan": lambda: direct_norm(act_BTI, grad_BTO),
            "bmm and norm": lambda: norms(torch.bmm(grad_BTO.mT, act_BTI)),
            "one by one": one_by_one,
            "product alone": lambda: torch.bmm(grad_BTO.mT, act_BTI),
        },
    )


if __name__ == "__main__":
    main("direct_norm", cases)
