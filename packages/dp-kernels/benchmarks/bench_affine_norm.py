"""Backward passes of RMSNorm with one gain gradient per sample: ours against PyTorch's.

    python bench_affine_norm.py [--output FILE] [--quick]

`not private` is the backward pass of PyTorch's own RMSNorm, with one gain gradient for the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main

from veilspan.kernels import rms_norm_backward
from veilspan.kernels.ops.affine_norm import work

EPS = 1e-5


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield widths of Llama 1B and 8B, and one head."""
    sizes = [(1, 4096, 2048), (1, 4096, 4096), (4, 1024, 4096), (1, 65536, 128)]
    if device.type == "cpu":
        sizes = [(2, 512, 1024)]
    for batch, tokens, width in [(2, 3, 8)] if quick else sizes:
        yield case(batch, tokens, width, device)


def case(batch: int, tokens: int, width: int, device: torch.device) -> Case:
    """Return the contestants of one size."""
    x = torch.randn(batch, tokens, width, device=device).bfloat16()
    grad = torch.randn_like(x)
    weight = torch.ones(width, device=device, dtype=x.dtype)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = F.rms_norm(leaves[0], (width,), leaves[1], EPS)

    def formulas() -> object:
        unit = x.float()
        scale = (unit.square().mean(2, keepdim=True) + EPS).rsqrt()
        unit, slope = unit * scale, grad.float()
        gain = (slope * unit).sum(1)
        slope = slope * weight
        back = ((slope - unit * (slope * unit).mean(2, keepdim=True)) * scale).bfloat16()
        return back, gain, gain.double().square().sum(1)

    contestants = {
        "veilspan": lambda: rms_norm_backward(x, weight, grad, eps=EPS),
        "formulas": formulas,
        "not private": lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True),
    }
    if device.type == "cuda":
        contestants["torch.compile"] = torch.compile(formulas)
    return Case(
        sizes={"B": batch, "T": tokens, "D": width},
        dtype=x.dtype,
        work=work(batch, tokens, width),
        contestants=contestants,
    )


if __name__ == "__main__":
    main("affine_norm", cases)
