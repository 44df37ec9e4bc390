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

from veilspan.kernels import clipped_sum
from veilspan.kernels.ops.clipped_sum import work

LLAMA = {"1b k": (2048, 512), "1b down": (8192, 2048), "8b q": (4096, 4096), "8b up": (4096, 14336)}
LENGTHS = [(16, 128), (4, 512), (1, 2048), (2, 8192)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    gpu = device.type == "cuda"
    layers = list(LLAMA.values()) if gpu else [(256, 64), (512, 512)]
    lengths = LENGTHS if gpu else [(4, 128), (1, 512)]
    if quick:
        layers, lengths = [(32, 16)], [(2, 8)]
    dtype = torch.bfloat16 if gpu else torch.float32
    for inputs, outputs in layers:
        for samples, tokens in lengths:
            yield case(samples, tokens, inputs, outputs, dtype, device)


def case(
    samples: int, tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Return one layer at one length."""
    act_BTI = torch.randn(samples, tokens, inputs, device=device).to(dtype)
    grad_BTO = torch.randn(samples, tokens, outputs, device=device).to(dtype)
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
