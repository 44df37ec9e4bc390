"""Bias gradients of each sample with their norms: ours against PyTorch's sum.

python bench_bias_norm.py [--output FILE] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main

from veilspan.kernels import bias_norm
from veilspan.kernels.ops.bias_norm import work


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield widths of projections with a bias, as in Qwen 2 and GPT-2."""
    sizes = [(1, 4096, 512), (1, 4096, 4096), (8, 1024, 3072)]
    if device.type == "cpu":
        sizes = [(2, 512, 1024)]
    for batch, tokens, width in [(2, 3, 8)] if quick else sizes:
        grad = torch.randn(batch, tokens, width, device=device).bfloat16()
        yield case(grad)


def case(grad: torch.Tensor) -> Case:
    """Return the contestants of one size."""

    def plain() -> object:
        sums = grad.sum(1, dtype=torch.float32)
        return sums, sums.double().square().sum(1)

    return Case(
        sizes=dict(zip("BTO", grad.shape, strict=True)),
        dtype=grad.dtype,
        work=work(*grad.shape),
        contestants={"veilspan": lambda: bias_norm(grad), "sum": plain},
    )


if __name__ == "__main__":
    main("bias_norm", cases)
