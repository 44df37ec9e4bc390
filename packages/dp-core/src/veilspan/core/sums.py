"""The clipped sum of one logical batch: fp32 accumulators, one per trainable parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veilspan.core.protocols import SequenceShards


class ClippedSum:
    """Σ_b factor_b · gradient_b of the records seen so far, in fp32 or fp64.

    Args:
        parameters: Trainable parameters by name.
        shards: Which part of each parameter this rank owns.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], shards: SequenceShards) -> None:
        self._parameters = parameters
        self._shards = shards
        self._sums: dict[str, Tensor] = {}

    def add_(self, name: str, gradient: Tensor, factor: float = 1.0) -> None:
        """Add `factor · gradient`, the part of parameter `name` owned here."""
        if factor == 0.0:
            return
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(
                gradient,
                dtype=torch.promote_types(gradient.dtype, torch.float32),
                memory_format=torch.contiguous_format,
            )
        self._sums[name].add_(gradient, alpha=factor)

    def add_samples_(self, name: str, grad_Bx: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · grad_b; a zero factor drops its sample, finite or not."""
        for gradient, factor in zip(grad_Bx.unbind(0), factor_B.tolist(), strict=True):
            self.add_(name, gradient, factor)

    def discard(self) -> None:
        """Forget every contribution."""
        self._sums.clear()

    def take(self) -> dict[str, Tensor]:
        """Return the sums by name, zeros where nothing was added, then forget them."""
        taken = {}
        for name, parameter in self._parameters.items():
            total = self._sums.pop(name, None)
            if total is None:
                local = self._shards.local(parameter.detach())
                dtype = torch.promote_types(local.dtype, torch.float32)
                total = torch.zeros(local.shape, dtype=dtype, device=local.device)
            taken[name] = total
        return taken
