"""Per-sample gradients of a linear map with their norms: ours, one big product, one by one.

    python bench_per_sample_grad.py [--output FILE] [--quick]

A ratio is their time over ours. All store gradients in the dtype of the operands; `product alone`
takes no norms, which bounds what can be had.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from layers import operands

from veilspan.kernels import per_sample_grad
from veilspan.kernels.ops.per_sample_grad import work

LENGTHS = [(4, 512), (1, 2048), (1, 8192)]  # samples and tokens


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield layers of Llama-3.2-1B and 3.1-8B on a GPU, small layers on a CPU."""
    for act_BTI, grad_BTO in operands(device, quick, LENGTHS):
        yield case(act_BTI, grad_BTO)


def case(act_BTI: torch.Tensor, grad_BTO: torch.Tensor) -> Case:
    """Return one layer at one length."""
    samples, tokens, inputs = act_BTI.shape
    outputs, dtype, device = grad_BTO.shape[2], act_BTI.dtype, act_BTI.device
    out = torch.empty(samples, outputs, inputs, dtype=dtype, device=device)

    def normed() -> object:
        torch.bmm(grad_BTO.mT, act_BTI, out=out)
        return torch.linalg.vector_norm(out, dim=(1, 2), dtype=torch.float32)

    def one_by_one() -> object:
        for b in range(samples):
            torch.mm(grad_BTO[b].mT, act_BTI[b], out=out[b])
        return [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in out]

    return Case(
        sizes={"B": samples, "T": tokens, "I": inputs, "O": outputs},
        dtype=dtype,
        work=work(
            samples,
            tokens,
            inputs,
            outputs,
            operand_bytes=dtype.itemsize,
            stored_bytes=dtype.itemsize,
        ),
        contestants={
            "veilspan": lambda: per_sample_grad(act_BTI, grad_BTO, out=out),
            "bmm and norm": normed,
            "one by one": one_by_one,
            "product alone": lambda: torch.bmm(grad_BTO.mT, act_BTI, out=out),
        },
    )


if __name__ == "__main__":
    main("per_sample_grad", cases)
