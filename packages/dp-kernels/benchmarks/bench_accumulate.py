"""Clipped contributions of one sample, many tensors: ours, torch._foreach, and one by one.

    python bench_accumulate.py [--output FILE] [--quick]

A ratio is their time over ours. The alternatives compute the factor on the device as ours does; the
squared norm of what is added, which ours returns, costs them another pass and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from veilspan.kernels import accumulate_, squared_norm
from veilspan.kernels.ops.accumulate import work

LLAMA_1B = [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 3 + [(2048,)] * 2


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield a norm and a sum over the tensors of some Llama-1B layers."""
    layers = 16 if device.type == "cuda" else 1
    shapes = [(64, 32), (7,)] if quick else LLAMA_1B * layers
    gradients = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    totals = [torch.zeros(shape, device=device) for shape in shapes]
    factor = torch.tensor(0.5, dtype=torch.float64, device=device)
    elements = sum(total.numel() for total in totals)
    whole = [total.to(torch.int64) for total in totals]

    factors = [factor.float()] * len(gradients)

    def foreach_norm() -> object:
        norms = torch._foreach_norm(gradients, dtype=torch.float32)  # pyright: ignore
        return torch.stack(norms).double().square().sum()

    def foreach_add() -> object:
        return torch._foreach_addcmul_(totals, gradients, factors)  # pyright: ignore

    def one_by_one() -> object:
        scale = factor.float()
        for total, gradient in zip(totals, gradients, strict=True):
            total.addcmul_(gradient.float(), scale)
        return totals

    sizes = {"tensors": len(shapes), "elements": elements}
    yield Case(
        sizes={**sizes, "norm": 1},
        dtype=torch.bfloat16,
        work=work(elements, gradient_bytes=2, total_bytes=0),
        contestants={"veilspan": lambda: squared_norm(gradients), "foreach_norm": foreach_norm},
    )
    yield Case(
        sizes={**sizes, "fp32": 1},
        dtype=torch.bfloat16,
        work=work(elements, gradient_bytes=2),
        contestants={
            "veilspan": lambda: accumulate_(totals, gradients, factor),
            "foreach_addcmul": foreach_add,
            "one by one": one_by_one,
        },
    )
    yield Case(
        sizes={**sizes, "int64": 1},
        dtype=torch.bfloat16,
        work=work(elements, gradient_bytes=2, total_bytes=8),
        contestants={"veilspan": lambda: accumulate_(whole, gradients, factor, grain=2.0**-40)},
    )


if __name__ == "__main__":
    main("accumulate", cases)
