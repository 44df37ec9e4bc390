"""Norm, clip and sum of one layer: ours, FlashDP's published method, and batched products.

    python bench_layerwise_clip.py [--output FILE] [--quick]

A ratio is their time over ours. `flashdp` is a plain reproduction of the published method: a loop
over samples that stores the product in the dtype of the operands, takes its norm, scales it, and
adds it to a sum of the same dtype. `bmm` forms the gradients of all samples first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import layerwise_clip_
from veilspan.kernels.ops.layerwise_clip import work

LENGTHS = [(8, 256), (4, 1024), (1, 4096)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS, more=[(64, 64)]):
        yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype = grad_BTO.shape[2], act_BTI.dtype
    total = torch.zeros(outputs, inputs, device=act_BTI.device)
    narrow = total.to(dtype)

    def flashdp() -> object:
        for act, grad in zip(act_BTI, grad_BTO, strict=True):
            product = grad.mT @ act
            norm = torch.linalg.vector_norm(product, dtype=torch.float32)
            narrow.add_(product * (1.0 / norm).clamp(max=1.0).to(dtype))
        return narrow

    def batched() -> object:
        grad_BOI = torch.bmm(grad_BTO.mT, act_BTI)
        norm_B = torch.linalg.vector_norm(grad_BOI, dim=(1, 2), dtype=torch.float32)
        factor_B = (1.0 / norm_B).clamp(max=1.0)
        return total.add_(torch.einsum("b,boi->oi", factor_B, grad_BOI.float()))

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(samples, tokens, inputs, outputs, operand_bytes=dtype.itemsize),
        contestants={
            "veilspan": lambda: layerwise_clip_(total, act_BTI, grad_BTO, clip_norm=1.0),
            "flashdp": flashdp,
            "bmm": batched,
        },
    )


if __name__ == "__main__":
    main("layerwise_clip", cases)
