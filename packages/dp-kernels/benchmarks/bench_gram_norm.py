"""Norms from inner products of tokens: ours, whole T x T products, and the direct form.

    python bench_gram_norm.py [--output FILE] [--quick]

A ratio is their time over ours. `T x T` is what ghost clipping is usually written as; it stores
both products of all samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import direct_norm, gram_norm
from veilspan.kernels.ops.gram_norm import work

LENGTHS = [(8, 256), (4, 1024), (1, 2048), (1, 4096)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS):
        yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype = grad_BTO.shape[2], act_BTI.dtype

    def whole() -> object:
        acts, grads = torch.bmm(act_BTI, act_BTI.mT), torch.bmm(grad_BTO, grad_BTO.mT)
        return (acts.float() * grads.float()).sum((1, 2))

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(samples, tokens, inputs, outputs, operand_bytes=dtype.itemsize),
        contestants={
            "veilspan": lambda: gram_norm(act_BTI, grad_BTO),
            "T x T": whole,
            "direct_norm": lambda: direct_norm(act_BTI, grad_BTO),
        },
    )


if __name__ == "__main__":
    main("gram_norm", cases)
