"""Per-sample gradients times a few vectors, in place of the gradients.

Shape letters: B samples, R rows of a weight, N its columns, k probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from veilspan.core.protocols import SequenceShards

ProbeRows = Callable[[int, int, Tensor], Tensor]
"""Elements `first … last - 1` of the probes of each sample, `[B, last - first, k]`.

Takes `first`, `last` and room for as many numbers, in which those that do not exist yet are made.
"""

_NUMBERS, _NUMBERS_GPU, _ROWS = 1 << 13, 1 << 17, 1 << 10


def rows_at_once(count: int, device: torch.device) -> int:
    """Return how many rows of `count` probes, or of a projection on them, exist at once.

    So few that they are little beside the product of activations and probes, and that an fp32 sum
    of squares over them keeps its digits; a GPU would rather start fewer products.
    """
    numbers = _NUMBERS if device.type == "cpu" else _NUMBERS_GPU
    return max(1, min(numbers // max(1, count), _ROWS))


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Per-sample gradients times probes, not the gradients.

    Args:
        values_BRk: G_b Z_b.
        size_B: Σ‖a‖‖g‖ over the terms that were added up: what the norm would be without
            cancellation, fp64.
        terms: Length of the sums behind each number, for the rounding.
    """

    values_BRk: Tensor
    size_B: Tensor
    terms: int

    def over(self, ranks: SequenceShards) -> Projection:
        """Return the projection of what the ranks of a sequence have together, in fp64."""
        return Projection(
            values_BRk=ranks.sum_scalars(self.values_BRk.double()),
            size_B=ranks.sum_scalars(self.size_B),
            terms=self.terms * ranks.degree,
        )

    def plus(self, other: Projection) -> Projection:
        """Return the projection of the sum of two gradients, in the memory of this one."""
        return Projection(
            values_BRk=self.values_BRk.add_(other.values_BRk),
            size_B=self.size_B + other.size_B,
            terms=self.terms + other.terms,
        )
