"""Trade-off curves: how few records an attack can mistake if it finds a share of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from veilspan.accounting.engines import CertifiedEngine, PldEngine
from veilspan.accounting.mechanism import SampledGaussian, check_number

_DELTAS = (
    *(1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)


class TradeOff(Protocol):
    """The trade-off curve f that a mechanism is claimed to keep: FNR ≥ f(FPR) for every test."""

    def least_missed(self, found: float) -> float:
        """Return the least false positive rate of a test whose true positive rate is `found`."""
        ...


@dataclass(frozen=True, kw_only=True)
class GaussianTradeOff:
    """The curve of telling N(0, 1) from N(μ, 1).

    Args:
        mu: μ, at least 0.

    Raises:
        ValueError: If `mu` is negative or no number.

    Source: Dong, Roth, Su (2019), https://arxiv.org/abs/1905.02383, Definition 2.6.
    """

    mu: float

    def __post_init__(self) -> None:
        if not check_number("mu", self.mu) >= 0:
            raise ValueError(f"mu is {self.mu}; it must be at least 0.")

    def least_missed(self, found: float) -> float:
        """Return Φ(Φ⁻¹(found) - μ)."""
        return float(ndtr(ndtri(found) - self.mu))


class SampledGaussianTradeOff:
    """A curve that a sampled Gaussian keeps for certain, from its ε at many δ.

    Args:
        mechanism: What is composed.

    Guarantee:
        The exact curve is nowhere below this one, in both directions of its relation: each upper
        bound on ε at some δ gives two lines below it, and this is the highest of them.
    """

    def __init__(self, mechanism: SampledGaussian) -> None:
        engine = CertifiedEngine(pld=PldEngine(one_sided=True))
        pairs = [(engine.epsilon(mechanism, delta).upper, delta) for delta in _DELTAS]
        finite = np.array([pair for pair in pairs if math.isfinite(pair[0])] or [(0.0, 1.0)])
        self._discount, self._delta = np.exp(-finite[:, 0]), finite[:, 1]
        with np.errstate(over="ignore"):
            self._growth = np.exp(finite[:, 0])

    def least_missed(self, found: float) -> float:
        """Return the false positive rate from which `found` is allowed by every (ε, δ)."""
        by_true = (found - self._delta) * self._discount
        missed = 1 - found
        by_false = 1 - self._delta - (self._growth * missed if missed > 0 else 0.0)
        return max(float(by_true.max()), float(by_false.max()), 0.0)


@lru_cache(maxsize=64)
def sampled_gaussian_curve(mechanism: SampledGaussian) -> SampledGaussianTradeOff:
    """Return the curve of a mechanism; the last ones are kept, as each takes tenths of a second."""
    return SampledGaussianTradeOff(mechanism)
