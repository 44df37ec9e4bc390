"""What every backward strategy works with, plus what it must do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from veilspan.core.attachment import Attachment
from veilspan.core.buffers import SampleBuffers
from veilspan.core.fsdp import forget_pass
from veilspan.core.groups import Groups
from veilspan.core.measures import Measure
from veilspan.core.protocols import SequenceShards
from veilspan.core.sums import ClippedSum

STORED_SLACK = 2.0**-19
"""Relative error, at most, of an fp32 norm taken of the very numbers that are summed."""

FORMED_SLACK = 2.0**-18
"""Relative error, at most, of an fp32 norm formed by other arithmetic than the sum.

Cancellation inside a layer is guarded apart from this, in the norms themselves.
"""

UNDERFLOW = 2.0**-110
"""Bound, for each element, on what squares and Gram products in fp32 lose where they underflow."""


@dataclass(kw_only=True)
class Workspace:
    """The parts of a private step that a strategy may touch.

    Args:
        attachment: The patched model.
        groups: Groups with the thresholds of this logical batch.
        shards: Who holds the rest of each sample and parameter.
        sums: The clipped sum of this logical batch.
        measure: Takes squared norms.
        buffers: Memory for per-sample gradients.
        within_M: Σ_b (1[norm ≤ C_m] - 1/2) of each group, fp64, where thresholds are adaptive.
        separable: Whether a probe has seen that a loss reaches its own record alone.
        is_record_B: Which rows of this micro-batch are records; None for all of them.
        discarded: Logical batches that ended without a release.
    """

    attachment: Attachment
    groups: Groups
    shards: SequenceShards
    sums: ClippedSum
    measure: Measure
    buffers: SampleBuffers = field(default_factory=SampleBuffers)
    within_M: Tensor | None = None
    separable: bool = False
    is_record_B: Tensor | None = None
    discarded: int = 0

    def discard(self) -> None:
        """Forget the logical batch, and what a pass of it left behind."""
        self.sums.discard()
        forget_pass(self.attachment.model, self.owned.values())
        self.discarded += 1

    @property
    def owned(self) -> Mapping[str, nn.Parameter]:
        """Trainable parameters by name."""
        return self.attachment.owned

    def slack(self, *, fp32: float) -> float:
        """Return the relative slack of norms: `fp32`, or 2^-42 where every parameter is fp64."""
        exact = all(p.dtype == torch.float64 for p in self.owned.values())
        return 2.0**-42 if exact else fp32

    def factors(self, group: int, sq_norm_B: Tensor, *, slack: float, first: int = 0) -> Tensor:
        """Return the factor of each sample in one group; once per sample and group.

        Args:
            group: Position of the group.
            sq_norm_B: Squared norms within the group, `[B]`, fp64.
            slack: Relative bound on the error of the norms.
            first: Row of the micro-batch that `sq_norm_B` begins with.
        """
        factor_B = self.groups.factors(group, sq_norm_B + self._lost_by_group[group], slack=slack)
        counted_B = torch.ones_like(sq_norm_B)
        if self.is_record_B is not None:
            counted_B = self.is_record_B[first : first + len(sq_norm_B)].to(sq_norm_B)
            factor_B = torch.where(counted_B != 0, factor_B, 0.0)
        if self.within_M is not None:
            within_B = sq_norm_B <= self.groups.clip_norms[group] ** 2  # False for NaN
            self.within_M[group] += ((within_B.double() - 0.5) * counted_B).sum()
        return factor_B

    @cached_property
    def _lost_by_group(self) -> list[float]:
        """What a squared norm of each group may have lost below the normal fp32 numbers."""
        lost = [0.0] * len(self.groups)
        for name, parameter in self.owned.items():
            if parameter.dtype != torch.float64:
                lost[self.groups.index[name]] += parameter.numel() * UNDERFLOW
        return lost

    def all_factors(self, sq_norm_MB: Tensor, *, slack: float) -> Tensor:
        """Return the factors of every group, `[M, B]` fp64."""
        rows = [self.factors(m, sq_norm_B, slack=slack) for m, sq_norm_B in enumerate(sq_norm_MB)]
        return torch.stack(rows)


class Backward(Protocol):
    """Differentiate one micro-batch and add its clipped gradients to the sum."""

    @property
    def name(self) -> str:
        """Name of the strategy as users write it."""
        ...

    @property
    def tapped(self) -> bool:
        """Whether the strategy needs taps, hence a rule for every trainable module."""
        ...

    def run(self, work: Workspace, losses_B: Tensor) -> None:
        """Add Σ_b factor_b · ∇losses_b to `work.sums`; leave no `.grad` behind."""
        ...
