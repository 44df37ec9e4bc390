"""Operands of linear maps to measure: Llama's on a GPU, small ones on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LLAMA = {"1b k": (2048, 512), "1b down": (8192, 2048), "8b q": (4096, 4096), "8b up": (4096, 14336)}
"""Input and output features of some layers of Llama-3.2-1B and 3.1-8B."""


def operands(
    device: torch.device,
    quick: bool,
    lengths: Sequence[tuple[int, int]],
    *,
    more: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and output gradients, `[B, T, I]` and `[B, T, O]`; bf16 on a GPU, else fp32.

    Args:
        device: Where to measure.
        quick: Ask for one tiny layer.
        lengths: Samples and tokens to measure on a GPU.
        more: Input and output features of further layers.
    """
    gpu = device.type == "cuda"
    layers = [*more, *LLAMA.values()] if gpu else [(256, 64), (512, 512)]
    sizes = lengths if gpu else [(4, 128), (1, 512)]
    if quick:
        layers, sizes = [(32, 16)], [(2, 8)]
    dtype = torch.bfloat16 if gpu else torch.float32
    for inputs, outputs in layers:
        for samples, tokens in sizes:
            act_BTI = torch.randn(samples, tokens, inputs, device=device).to(dtype)
            yield act_BTI, torch.randn(samples, tokens, outputs, device=device).to(dtype)
