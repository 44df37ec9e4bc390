"""Per-sample gradients times a few vectors, in place of the gradients.

Shape letters: B samples, R rows of a weight, N its columns, k probes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veilspan.core.protocols import SequenceShards


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
