"""Norms of embedding gradients: ours against tables of distinct tokens, and Gram products.

    python bench_embedding_norm.py [--output FILE] [--quick]

Tokens follow Zipf's law, as words do; `one token` is the worst case of a single repeated token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main
from torch import Tensor

from veilspan.kernels import embedding_norm
from veilspan.kernels.ops.embedding_norm import work

VOCABULARY = 128256


def zipf(batch: int, tokens: int, device: torch.device) -> Tensor:
    """Return token ids whose frequency falls as 1/rank."""
    ranks = torch.rand(batch, tokens, device=device).mul(torch.log(torch.tensor(VOCABULARY)))
    return ranks.exp().long().clamp_(max=VOCABULARY - 1)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield widths of Llama 1B and 8B."""
    sizes = [(1, 4096, 2048), (1, 16384, 4096), (8, 1024, 4096)]
    if device.type == "cpu":
        sizes = [(2, 512, 512)]
    for batch, tokens, width in [(2, 6, 8)] if quick else sizes:
        grad = torch.randn(batch, tokens, width, device=device).bfloat16()
        yield case(zipf(batch, tokens, device), grad, alike=0)
        yield case(torch.zeros(batch, tokens, dtype=torch.int64, device=device), grad, alike=1)


def case(tokens: Tensor, grad: Tensor, *, alike: int) -> Case:
    """Return the contestants of one size."""

    def distinct() -> object:
        norms = []
        for ids, part in zip(tokens, grad, strict=True):
            rows, place = torch.unique(ids, return_inverse=True)
            sums = part.new_zeros((len(rows), part.shape[1]), dtype=torch.float32)
            norms.append(sums.index_add_(0, place, part.float()).square().sum())
        return torch.stack(norms)

    def gram() -> object:
        same = tokens[:, :, None] == tokens[:, None, :]
        return (torch.bmm(grad, grad.mT) * same).sum((1, 2), dtype=torch.float32)

    return Case(
        sizes={**dict(zip("BTD", grad.shape, strict=True)), "one token": alike},
        dtype=grad.dtype,
        work=work(*grad.shape),
        contestants={
            "veilspan": lambda: embedding_norm(tokens, grad),
            "distinct": distinct,
            "gram": gram,
        },
    )


if __name__ == "__main__":
    main("embedding_norm", cases)
