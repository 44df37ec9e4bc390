"""Cross entropy and its gradient, in place: ours against PyTorch's.

    python bench_cross_entropy.py [--output FILE] [--quick]

Every contestant leaves the gradient in a tensor of the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, main

from veilspan.kernels import cross_entropy_
from veilspan.kernels.ops.cross_entropy import work


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield chunks of logits of Llama 3 and of GPT-2."""
    sizes = [(4096, 128256), (1024, 128256), (4096, 50257)]
    if device.type == "cpu":
        sizes = [(64, 32000)]
    for tokens, vocabulary in [(3, 8)] if quick else sizes:
        yield case(tokens, vocabulary, device)


def case(tokens: int, vocabulary: int, device: torch.device) -> Case:
    """Return the contestants of one size."""
    logits = torch.randn(tokens, vocabulary, device=device).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), device=device)
    scale = torch.tensor(1.0 / tokens, device=device)
    leaf = logits.clone().requires_grad_()

    def autograd() -> object:
        loss = F.cross_entropy(leaf.float(), labels)
        return torch.autograd.grad(loss, leaf)

    def softmax() -> object:
        wide = logits.float()
        level = wide.logsumexp(1, keepdim=True)
        slope = (wide - level).exp()
        slope[torch.arange(tokens, device=device), labels] -= 1.0
        return level - wide.gather(1, labels[:, None]), (slope * scale).bfloat16()

    contestants = {
        "veilspan": lambda: cross_entropy_(logits, labels, scale),
        "autograd": autograd,
        "softmax": softmax,
    }
    if device.type == "cuda":
        contestants["torch.compile"] = torch.compile(softmax)
    return Case(
        sizes={"N": tokens, "V": vocabulary},
        dtype=logits.dtype,
        work=work(tokens, vocabulary),
        contestants=contestants,
    )


if __name__ == "__main__":
    main("cross_entropy", cases)
