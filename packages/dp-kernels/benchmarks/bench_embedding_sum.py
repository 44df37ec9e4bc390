"""Clipped sums of embedding gradients: ours against index_add_ and PyTorch's own backward pass.

    python bench_embedding_sum.py [--output FILE] [--quick]

`not private` is the backward pass of PyTorch's embedding, without factors; it writes a new table.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_embedding_norm import VOCABULARY, zipf
from harness import Case, main
from torch import Tensor

from veilspan.kernels import embedding_sum_
from veilspan.kernels.ops.embedding_sum import work


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield widths of Llama 1B and 8B."""
    sizes = [(1, 4096, 2048), (8, 1024, 4096)]
    if device.type == "cpu":
        sizes = [(2, 512, 256)]
    for batch, tokens, width in [(2, 6, 8)] if quick else sizes:
        grad = torch.randn(batch, tokens, width, device=device).bfloat16()
        yield case(zipf(batch, tokens, device), grad)


def case(tokens: Tensor, grad: Tensor) -> Case:
    """Return the contestants of one size."""
    total = torch.zeros(VOCABULARY, grad.shape[2], device=grad.device)
    factor = torch.full((len(grad),), 0.5, device=grad.device)

    def index_add() -> object:
        terms = grad.float() * factor[:, None, None]
        return total.index_add_(0, tokens.flatten(), terms.flatten(0, 1))

    def not_private() -> object:
        flat = grad.flatten(0, 1)
        place = tokens.flatten()
        return torch.ops.aten.embedding_dense_backward(flat, place, VOCABULARY, -1, False)

    return Case(
        sizes=dict(zip("BTD", grad.shape, strict=True)),
        dtype=grad.dtype,
        work=work(tokens.numel(), grad.shape[2], rows=len(tokens.unique())),
        contestants={
            "veilspan": lambda: embedding_sum_(total, tokens, grad, factor),
            "index_add": index_add,
            "not private": not_private,
        },
    )


if __name__ == "__main__":
    main("embedding_sum", cases)
