"""One release over a batch of fixed size, drawn without replacement, with one record replaced.

Let γ be the share of the records in a batch, and contributions have norms of at most 1. Let M(u)
and M(v) be the output given that the record is in the batch, with its old and its new contribution,
and M₀ that given that it is not. Write e^ε = 1 + γ (e^t - 1) and β = e^(ε - t). Then for ε ≥ 0 the
hockey-stick divergence of the two outputs is

    H(ε) = γ H_t(M(u), (1 - β) M₀ + β M(v))
         ≤ γ (1 - β) H_t(M(u), M₀) + γ β H_t(M(u), M(v)) ≤ γ δ(t)

where δ(t) belongs to two Gaussians with means 2 apart: u becomes v, or the record changes places
with one that is not in the batch. The pair

    P = (1 - γ) N(0, σ²) + γ N(2, σ²)        Q = N(0, σ²)

attains it. At negative ε, H(-ε) = 1 - e^(-ε) + e^(-ε) H(ε), as either data set may be called the
first, and no pair attains both. The loss that does dominates every such release, also under
composition: its positive values are those of log P/Q, each value l of mass m has an image of mass
m e^(-l) at -l, and all other mass lies at 0.

Source: Balle, Barthe, Gaboardi (2018), https://arxiv.org/abs/1807.01647, Theorems 2 and 10; Zhu,
Dong, Wang (2022), https://arxiv.org/abs/2106.08567, Theorems 10 and 11; that no pair attains both
signs: Lebeda, Regehr, Kamath, Steinke (2024), https://arxiv.org/abs/2405.20769.
"""

from __future__ import annotations

import math

import numpy as np

from veilspan.accounting.engines.discretise import GridLoss, dominated
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.mechanism import SampledGaussian


class MirroredStep:
    """The loss of one release, `0 < γ < 1` and `0 < σ < ∞`.

    Args:
        share: γ, the batch size over the number of records.
        sigma: σ, of sensitivity 1 to one contribution.

    Guarantee:
        `dominating` bounds every release with fixed-size batches from above. `dominated` belongs to
        the pair (P, Q), which is such a release: the record contributes 1 in one data set and -1,
        like all others, in the other. The two do not meet however fine the grid: between them lie
        releases of which nobody knows the worst.
    """

    def __init__(self, share: float, sigma: float) -> None:
        self._positive = OneStep(
            SampledGaussian(noise_multiplier=sigma / 2, sampling_probability=share, steps=1)
        )

    def loss_scale(self) -> float:
        """Return the order of magnitude of the standard deviation of the loss."""
        return self._positive.loss_scale()

    def dominating(self, spacing: float, tail: float) -> GridLoss:
        """Return a loss that dominates this one: every ε computed from it is an upper bound."""
        step = self._positive
        zero = -step.bottom  # where the loss is 0, as an excess
        largest = max(step.largest_excess(tail), zero + spacing)
        cells = step.cells_above(zero, zero, spacing, largest)
        loss = spacing * cells.index
        upward = np.minimum(cells.excess / -np.expm1(-np.diff(loss)), cells.with_record)
        right = np.zeros(len(loss))
        right[1:] += upward
        right[:-1] += cells.with_record - upward
        left = np.exp(-loss) * right
        left[-1] += cells.tail[1]  # losses below the last node's image are raised to it
        rest = 1 - math.fsum(right[1:]) - math.fsum(left[1:]) - cells.tail[0]
        index = np.concatenate([-cells.index[:0:-1], cells.index])
        mass = np.concatenate([left[:0:-1], [max(rest, 0.0)], right[1:]])
        return GridLoss(0.0, spacing, index, mass, cells.tail[0])

    def dominated(self, spacing: float, tail: float) -> GridLoss:
        """Return a loss that is dominated by that of a release with fixed-size batches."""
        step = self._positive
        return dominated(step, "remove", spacing, step.largest_excess(tail))
