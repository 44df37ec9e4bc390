"""Cases whose ε has a closed form: nothing released, no noise, no sampling."""

from __future__ import annotations

import math
from typing import Any

from scipy.optimize import brentq
from scipy.special import log_ndtr

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.mechanism import SampledGaussian

# The closed form is evaluated in doubles and its root found to 4 ulp; this margin covers both.
_MARGIN = 1e-10


def closed_form(mechanism: SampledGaussian, delta: float) -> EpsilonBounds | None:
    """Return ε where it is known exactly, and None where it has to be computed.

    Guarantee:
        ε is 0 if nothing is released or the noise is infinite, infinite if anything is released
        without noise, and the analytic Gaussian's if every record is in every sample.
    """
    sigma, q, steps = mechanism.noise_multiplier, mechanism.sampling_probability, mechanism.steps
    if q == 0 or steps == 0 or math.isinf(sigma):
        return _exact(0.0, delta, "exact (nothing about a record is released)")
    if sigma == 0:
        return _exact(math.inf, delta, "exact (released without noise)")
    if q == 1:
        epsilon = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
        return EpsilonBounds(
            lower=epsilon * (1 - _MARGIN),
            estimate=epsilon,
            upper=epsilon * (1 + _MARGIN),
            delta=delta,
            direction="both",
            method="analytic Gaussian",
        )
    return None


def _exact(epsilon: float, delta: float, method: str) -> EpsilonBounds:
    return EpsilonBounds(
        lower=epsilon,
        estimate=epsilon,
        upper=epsilon,
        delta=delta,
        direction="both",
        method=method,
    )


def gaussian_log_delta(epsilon: float, mu: float) -> float:
    """Return log δ(ε) of one Gaussian release with sensitivity `mu` times its noise.

    Source: Balle, Wang (2018), https://arxiv.org/abs/1805.06530, Theorem 8.
    """
    log_first = float(log_ndtr(mu / 2 - epsilon / mu))
    log_second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    gap = log_second - log_first
    return log_first + math.log(-math.expm1(gap)) if gap < 0 else -math.inf


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at `delta` of one Gaussian release with sensitivity `mu` times its noise."""
    target = math.log(delta)
    if gaussian_log_delta(0.0, mu) <= target:
        return 0.0
    high = max(mu, mu**2)
    while gaussian_log_delta(high, mu) > target:
        high *= 2
    root: Any = brentq(lambda e: gaussian_log_delta(e, mu) - target, 0.0, high, xtol=1e-300)
    return float(root)
