"""Thresholds that follow a private quantile of the norms.

In each logical batch, every group counts the samples whose norm is within its threshold, noise is
added to the counts, and the thresholds move for the *next* batch: within a batch they are
constants, the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class PrivateQuantile:
    """Move each threshold geometrically toward a quantile of its group's norms.

    Counts and gradients are released together, as one Gaussian mechanism whose noise multiplier is
    the step's own: the counts take `share` of its inverse variance, and the gradients get
    `1/√(1-share)` times the noise instead. ε is therefore what it is without adaptation, and the
    price is visible in the noise: 0.5 % more at a share of 0.01.

    Source: Andrew et al. (2021), https://arxiv.org/abs/1905.03871, Theorem 1; divided among groups
    as in He et al. (2022), https://arxiv.org/abs/2212.01539.

    Args:
        quantile: Fraction of samples that should be within the threshold; in (0, 1).
        learning_rate: Step of the logarithm of a threshold; positive.
        share: Part of the privacy budget that the counts take; in (0, 1).

    Raises:
        ValueError: If a number is outside of its range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("quantile", "share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(
                f"learning_rate is {self.learning_rate}; it must be a positive number."
            )

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the multiplier z_Δ of the gradients' noise: 1/z² = 1/z_Δ² + share/z²."""
        return noise_multiplier / math.sqrt(1.0 - self.share)

    def count_stddev(self, noise_multiplier: float, groups: int) -> float:
        """Return the standard deviation of the noise on each of M counts.

        A sample adds ±1/2 to each count, so the counts have L2 sensitivity √M/2.
        """
        return noise_multiplier * math.sqrt(groups / self.share) / 2.0

    def moved(
        self, clip_norms: Sequence[float], noisy_counts: Tensor, expected_batch_size: float
    ) -> tuple[float, ...]:
        """Return the thresholds of the next logical batch.

        Args:
            clip_norms: The thresholds of this one, M of them.
            noisy_counts: Σ_b (1[norm ≤ C_m] - 1/2) plus noise, `[M]`.
            expected_batch_size: The public constant that stands for the number of samples.
        """
        fraction = (noisy_counts.double() / expected_batch_size + 0.5).clamp(0.0, 1.0)
        steps = torch.exp(-self.learning_rate * (fraction - self.quantile)).tolist()
        return tuple(c * step for c, step in zip(clip_norms, steps, strict=True))
