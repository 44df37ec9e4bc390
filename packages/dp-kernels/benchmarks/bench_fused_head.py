"""Heads of language models with per-sample gradients: kept, formed again, and not private.

    python bench_fused_head.py [--output FILE] [--quick]

A call of ours includes the clipped sum. `logits` holds all logits of a sample and differentiates
sample by sample; `not private` does so for the batch, with one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main
from torch import Tensor

from veilspan.kernels import fused_head, squared_norm
from veilspan.kernels.ops.fused_head import work


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the heads of Llama 1B and 8B."""
    sizes = [(1, 4096, 2048, 128256), (1, 4096, 4096, 128256), (4, 1024, 2048, 128256)]
    if device.type == "cpu":
        sizes = [(2, 128, 128, 8192)]
    for batch, tokens, width, vocabulary in [(2, 3, 4, 8)] if quick else sizes:
        hidden = torch.randn(batch, tokens, width, device=device).bfloat16()
        weight = (torch.randn(vocabulary, width, device=device) / width**0.5).bfloat16()
        yield case(hidden, weight)


def case(hidden: Tensor, weight: Tensor) -> Case:
    """Return the contestants of one size."""
    batch, tokens, width = hidden.shape
    labels = torch.randint(len(weight), (batch, tokens), device=hidden.device)
    factor = torch.full((batch,), 0.5, device=hidden.device)
    total = torch.zeros(weight.shape, device=hidden.device)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def ours(*, keep: bool) -> object:
        found = fused_head(hidden, weight, labels, keep_gradient=keep)
        return found.add_clipped_(factor, total)

    def logits() -> object:
        norms = []
        for b in range(batch):
            loss = F.cross_entropy((leaves[0][b] @ leaves[1].mT).float(), labels[b])
            _, slope = torch.autograd.grad(loss, leaves)
            total.add_(slope, alpha=0.5)
            norms.append(squared_norm([slope]))
        return norms

    def not_private() -> object:
        loss = F.cross_entropy((leaves[0] @ leaves[1].mT).flatten(0, 1).float(), labels.flatten())
        return torch.autograd.grad(loss, leaves)

    return Case(
        sizes={"B": batch, "T": tokens, "D": width, "V": len(weight)},
        dtype=hidden.dtype,
        work=work(batch * tokens, len(weight), width),
        contestants={
            "veilspan": lambda: ours(keep=True),
            "veilspan, formed again": lambda: ours(keep=False),
            "logits": logits,
            "not private": not_private,
        },
    )


if __name__ == "__main__":
    main("fused_head", cases)
