"""Clipped sums of weight gradients: ours, scaled operands, sample by sample.

    python bench_clipped_sum.py [--output FILE] [--quick]

A ratio is their time over ours. `scaled operand` rounds a factor times a gradient to the dtype of
the operands, so that a contribution may exceed the clip norm; it is here for its speed, which is
that of the plain weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import clipped_sum
from veilspan.kernels.ops.clipped_sum import work

LENGTHS = [(16, 128), (4, 512), (1, 2048), (2, 8192)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS):
        yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype, device = grad_BTO.shape[2], act_BTI.dtype, act_BTI.device
    factor_B = torch.rand(samples, device=device)
    total = torch.zeros(outputs, inputs, device=device)

    def scaled_operand() -> object:
        scaled = grad_BTO * factor_B.to(dtype)[:, None, None]
        return total.add_(scaled.flatten(0, 1).mT @ act_BTI.flatten(0, 1))

    def one_by_one() -> object:
        for act, grad, factor in zip(act_BTI, grad_BTO, factor_B, strict=True):
            total.addcmul_((grad.mT @ act).float(), factor)
        return total

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(samples, tokens, inputs, outputs, operand_bytes=dtype.itemsize, add=True),
        contestants={
            "veilspan": lambda: clipped_sum(act_BTI, grad_BTO, factor_B, total=total),
            "scaled operand": scaled_operand,
            "one by one": one_by_one,
            "product alone": lambda: grad_BTO.flatten(0, 1).mT @ act_BTI.flatten(0, 1),
        },
    )


if __name__ == "__main__":
    main("clipped_sum", cases)
