"""Cases whose ε has a closed form: nothing released, no noise, no sampling."""

from __future__ import annotations

import math
from typing import Any

from scipy.optimize import brentq
from scipy.special import log_ndtr

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.mechanism import Mechanism, SampledGaussian

# The closed form is evaluated in doubles and its root found to 4 ulp; this margin covers both.
_MARGIN = 1e-10
_DELTA_MARGIN, _CANCELLATION = 1e-9, 1e-13
SMALLEST_DELTA = 1e-300  # upper bounds on a δ below this are this, as doubles soon end
_NOTHING = "exact (nothing about a record is released)"
_NO_NOISE = "exact (released without noise)"
_GAUSSIAN = "analytic Gaussian"


def live_parts(mechanism: Mechanism) -> tuple[SampledGaussian, ...]:
    """Return the phases that release anything about a record."""
    return tuple(
        part
        for part in mechanism.parts
        if part.sampling_probability > 0
        and part.steps > 0
        and not math.isinf(part.noise_multiplier)
    )


def refuse_overflow(mechanism: Mechanism) -> None:
    """Raise `EngineError` where samples may be cut: their chance has to be charged to δ first."""
    if any(part.overflow > 0 and part.steps > 0 for part in mechanism.parts):
        raise EngineError(
            "samples may be larger than what is processed (sampling='truncated_poisson'); only the "
            "certified engine counts that."
        )


def estimated_norms(mechanism: Mechanism) -> bool:
    """Return whether contributions of any phase may exceed their threshold."""
    return any(part.norms is not None for part in live_parts(mechanism))


def several_records(mechanism: Mechanism) -> bool:
    """Return whether a unit may hold several records in any phase."""
    return any(part.records_per_unit > 1 for part in live_parts(mechanism))


def distance_without_sampling(parts: tuple[SampledGaussian, ...]) -> float:
    """Return the distance of the means over the noise were every record in every sample.

    It is infinite where contributions may exceed their threshold.
    """
    if any(part.norms is not None for part in parts):
        return math.inf
    return math.sqrt(
        sum(part.steps * (part.distance / part.noise_multiplier) ** 2 for part in parts)
    )


def closed_form(mechanism: Mechanism, delta: float) -> EpsilonBounds | None:
    """Return ε where it is known exactly, and None where it has to be computed.

    Guarantee:
        ε is 0 if nothing is released or the noise is infinite, infinite if anything is released
        without noise, and the analytic Gaussian's if every record is in every sample.
    """
    refuse_overflow(mechanism)
    parts = live_parts(mechanism)
    if not parts:
        return _exact(0.0, delta, _NOTHING)
    if any(part.noise_multiplier == 0 for part in parts):
        return _exact(math.inf, delta, _NO_NOISE)
    if any(part.sampling_probability < 1 for part in parts):
        return None
    epsilon = gaussian_epsilon(distance_without_sampling(parts), delta)
    return EpsilonBounds(
        lower=epsilon * (1 - _MARGIN),
        estimate=epsilon,
        upper=epsilon * (1 + _MARGIN),
        delta=delta,
        direction="both",
        method=_GAUSSIAN,
    )


def closed_form_delta(mechanism: Mechanism, epsilon: float) -> DeltaBounds | None:
    """Return δ where it is known exactly, and None where it has to be computed.

    Without noise δ is the chance that a unit is in any of the samples that get none, unless other
    releases add to it; then it is only bounded by that and 1.
    """
    refuse_overflow(mechanism)
    parts = live_parts(mechanism)
    if not parts:
        return _delta(0.0, 0.0, epsilon, _NOTHING)
    bare = [part for part in parts if part.noise_multiplier == 0]
    if bare:
        missed = sum(
            part.steps * part.records_per_unit * math.log1p(-part.sampling_probability)
            if part.sampling_probability < 1
            else -math.inf
            for part in bare
        )
        seen = -math.expm1(missed)
        return _delta(seen * (1 - _MARGIN), 1.0, epsilon, _NO_NOISE)
    if any(part.sampling_probability < 1 for part in parts):
        return None
    mu = distance_without_sampling(parts)
    return _delta(
        gaussian_delta(epsilon, mu, -1), gaussian_delta(epsilon, mu, +1), epsilon, _GAUSSIAN
    )


def _delta(lower: float, upper: float, epsilon: float, method: str) -> DeltaBounds:
    return DeltaBounds(
        lower=lower,
        estimate=(lower + upper) / 2,
        upper=upper,
        epsilon=epsilon,
        direction="both",
        method=method,
    )


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


def gaussian_delta(epsilon: float, mu: float, sign: int) -> float:
    """Return δ(ε) of one Gaussian release from above (`sign` +1) or below (-1)."""
    if math.isinf(mu):
        return 1.0
    moved = epsilon * (1 - sign * _MARGIN)
    # δ is the difference of two terms that nearly cancel where mu is small.
    first = math.exp(float(log_ndtr(mu / 2 - moved / mu)))
    slack = _DELTA_MARGIN * math.exp(gaussian_log_delta(moved, mu)) + _CANCELLATION * first
    value = math.exp(gaussian_log_delta(moved, mu)) + sign * slack
    return min(max(value, SMALLEST_DELTA if sign > 0 else 0.0), 1.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at `delta` of one Gaussian release with sensitivity `mu` times its noise."""
    if math.isinf(mu):
        return math.inf
    target = math.log(delta)
    if gaussian_log_delta(0.0, mu) <= target:
        return 0.0
    high = max(mu, mu**2)
    while gaussian_log_delta(high, mu) > target:
        high *= 2
    root: Any = brentq(lambda e: gaussian_log_delta(e, mu) - target, 0.0, high, xtol=1e-300)
    return float(root)
