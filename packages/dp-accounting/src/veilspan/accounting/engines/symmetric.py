"""One release whose two distributions mirror each other, put on a grid of its privacy loss.

    P = (1 - q) N(0, σ²) + q N(1, σ²)        Q = (1 - q) N(0, σ²) + q N(-1, σ²)

P belongs to one value of a record and Q to another. With q = 1 it is the plain Gaussian with means
2 apart. The loss L(x) = log P(x)/Q(x) is odd and increasing, so both directions are one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from veilspan.accounting.engines.discretise import GridLoss, merge
from veilspan.accounting.engines.one_step import (
    FINE_DEVIATIONS,
    LARGEST_LOSS,
    Array,
    Cells,
    distances,
)
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.shifts import interval_probability

_LARGE_LOG = 30.0  # beyond e^30 the inverse hyperbolic sine is a logarithm to all digits


class SymmetricStep:
    """The pair (P, Q) of one release, `0 < q ≤ 1` and `0 < σ < ∞`.

    Guarantee:
        For replacing a record this pair dominates every other of a Poisson-sampled Gaussian, at all
        ε and so under composition. Given the other records in the sample, the two outputs are
        `(1 - q) N(0) + q N(u)` and `(1 - q) N(0) + q N(v)` with norms of u and v at most 1. Divide
        the densities by that of N(0): δ(ε) is the mean of `(q A - e^ε q B - c)⁺`, where A and B are
        jointly log-normal with mean 1, log-variances |u|²/σ² and |v|²/σ² and log-covariance
        u·v/σ². The function is convex in A and in B, and its mixed derivative is not positive, so
        by Gaussian interpolation the mean grows with both variances and as the covariance falls:
        it is largest at |u| = 1 and v = -u. Averaging over the other records only lowers it.

    Source:
        Interpolation: Plackett (1954), https://doi.org/10.2307/2332716. Composition of dominating
        pairs: Zhu, Dong, Wang (2022), https://arxiv.org/abs/2106.08567, Theorem 10. The same pair:
        Lebeda, Regehr, Kamath, Steinke (2024), https://arxiv.org/abs/2405.20769.
    """

    def __init__(self, q: float, sigma: float) -> None:
        self.q, self.sigma = q, sigma
        # log of w = q exp(-1/(2σ²)) / (1 - q): the weight of the record against the rest at x = 0
        self._log_weight = (
            math.inf if q == 1 else math.log(q) - math.log1p(-q) - 0.5 / sigma / sigma
        )

    def loss_scale(self) -> float:
        """Return the order of magnitude of the standard deviation of the loss."""
        spread = 2 * math.sqrt(math.sinh(min(self.sigma**-2, 50.0)))
        return min(self.q * spread, 2 / self.sigma)

    def largest_loss(self, tail: float) -> float:
        """Return a loss that is passed with probability at most `tail` under P.

        Raises:
            EngineError: If it is too large for doubles.
        """
        with_record = 1 - self.sigma * float(ndtri(min(tail / (2 * self.q), 0.5)))
        x = max(with_record, -self.sigma * float(ndtri(tail / 2)))
        scaled = x / self.sigma / self.sigma
        if self.q == 1:
            loss = 2 * scaled
        else:
            weight = self._log_weight
            loss = float(np.logaddexp(0, weight + scaled) - np.logaddexp(0, weight - scaled))
        if not loss <= LARGEST_LOSS:
            raise EngineError(f"the loss of one step reaches {loss:.3g}, beyond a double's range")
        return loss

    def position(self, loss: Array) -> Array:
        """Return the x at which the loss has a value: σ² (t/2 + arsinh(sinh(t/2) / w))."""
        half = np.abs(loss) / 2
        if self.q == 1:
            return self.sigma**2 * loss / 2
        with np.errstate(divide="ignore"):
            log_sinh = half + np.log(-np.expm1(-2 * half)) - math.log(2)
        log_ratio = log_sinh - self._log_weight
        arsinh = np.where(
            log_ratio > _LARGE_LOG,
            log_ratio + math.log(2),
            np.arcsinh(np.exp(np.minimum(log_ratio, _LARGE_LOG))),
        )
        return np.copysign(self.sigma**2 * (half + arsinh), loss)

    def cells(self, spacing: float, largest: float) -> tuple[Cells, float]:
        """Cut the loss at `spacing` · i on both sides of 0; also return P below the first node."""
        last = max(1, math.ceil(largest / spacing))
        fine = math.ceil(FINE_DEVIATIONS * self.loss_scale() / spacing)
        right = np.unique(distances(last, fine))
        index = np.concatenate([-right[:0:-1], right])
        t = spacing * index
        if t[-1] > LARGEST_LOSS + 100:
            raise EngineError(f"a grid of spacing {spacing:.3g} leaves the range of doubles")
        q, z = self.q, self.position(t) / self.sigma
        rest = (1 - q) * interval_probability(z)
        up = q * interval_probability(z - 1 / self.sigma)
        down = q * interval_probability(z + 1 / self.sigma)
        # P - e^t Q without subtracting the rest, which cancels near t = 0.
        excess = up - np.exp(t[:-1]) * down - np.expm1(t[:-1]) * rest
        deficit = np.exp(t[1:]) * down - up + np.expm1(t[1:]) * rest
        beyond = _tails(q, self.sigma, float(z[-1]))
        cells = Cells(
            start=0.0,
            index=index,
            with_record=rest + up,
            without_record=rest + down,
            excess=np.maximum(excess, 0.0),
            deficit=np.maximum(deficit, 0.0),
            tail=beyond,
        )
        return cells, beyond[1]  # P below -t is Q above t

    def dominating(self, spacing: float, tail: float) -> GridLoss:
        """Return a loss that dominates this one: every ε computed from it is an upper bound."""
        cells, below = self.cells(spacing, self.largest_loss(tail))
        loss = spacing * cells.index
        upward = np.minimum(cells.excess / -np.expm1(-np.diff(loss)), cells.with_record)
        mass = np.zeros(len(loss))
        mass[1:] += upward
        mass[:-1] += cells.with_record - upward
        mass[0] += below
        return GridLoss(0.0, spacing, cells.index, mass, cells.tail[0])

    def dominated(self, spacing: float, tail: float) -> GridLoss:
        """Return a loss that this one dominates: every ε computed from it is a lower bound."""
        cells, _ = self.cells(spacing, self.largest_loss(tail))
        mass = merge(cells.with_record, cells.excess, cells.deficit)
        mass[-1] += cells.tail[0]
        # What lies below the first node counts as a loss of -∞, which adds nothing to any δ.
        return GridLoss(0.0, spacing, cells.index, mass, 0.0)


def _tails(q: float, sigma: float, z: float) -> tuple[float, float]:
    """Return P and Q above the standardised point z."""
    rest: Any = (1 - q) * ndtr(-z)
    up, down = q * ndtr(1 / sigma - z), q * ndtr(-1 / sigma - z)
    return float(rest + up), float(rest + down)
