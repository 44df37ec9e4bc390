"""What every backward strategy works with, plus what it must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veilspan.core.attachment import Attachment
from veilspan.core.clipping import Flat
from veilspan.core.protocols import SequenceShards
from veilspan.core.sums import ClippedSum


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The parts of a private step that a strategy may touch."""

    attachment: Attachment
    clipping: Flat
    shards: SequenceShards
    sums: ClippedSum

    def slack(self, *, fp32: float) -> float:
        """Return the relative slack of norms: `fp32`, or 2^-42 where every parameter is fp64."""
        exact = all(p.dtype == torch.float64 for p in self.attachment.owned.values())
        return 2.0**-42 if exact else fp32


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
