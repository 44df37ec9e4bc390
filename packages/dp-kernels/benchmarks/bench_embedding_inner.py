"""Cross terms of tables that an embedding and a head share: ours against a gather and a product.

python bench_embedding_inner.py [--output FILE] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_embedding_norm import VOCABULARY, zipf
from harness import Case, main
from torch import Tensor

from veilspan.kernels import embedding_inner
from veilspan.kernels.ops.embedding_inner import work


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the width of Llama 1B, whose table is shared."""
    sizes = [(1, 4096, 2048), (4, 1024, 2048)]
    if device.type == "cpu":
        sizes = [(1, 512, 256)]
    for batch, tokens, width in [(2, 6, 8)] if quick else sizes:
        grad = torch.randn(batch, tokens, width, device=device).bfloat16()
        yield case(zipf(batch, tokens, device), grad)


def case(tokens: Tensor, grad: Tensor) -> Case:
    """Return the contestants of one size."""
    batch, _, width = grad.shape
    table = torch.randn(batch, VOCABULARY, width, dtype=grad.dtype, device=grad.device)
    samples = torch.arange(batch, device=grad.device)[:, None]

    def gather() -> object:
        return (grad.float() * table[samples, tokens].float()).sum((1, 2))

    return Case(
        sizes=dict(zip("BTD", grad.shape, strict=True)),
        dtype=grad.dtype,
        work=work(*grad.shape),
        contestants={
            "veilspan": lambda: embedding_inner(tokens, grad, table),
            "gather": gather,
        },
    )


if __name__ == "__main__":
    main("embedding_inner", cases)
