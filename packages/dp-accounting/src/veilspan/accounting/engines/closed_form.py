"""Cases whose ε has a closed form: nothing released, no noise, no sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from scipy.optimize import brentq
from scipy.special import log_ndtr

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.mechanism import Mechanism, SampledGaussian

# The closed form is evaluated in doubles; these margins cover it.
_MARGIN = 1e-10
_DELTA_MARGIN, _CANCELLATION, _LARGE_LOG = 1e-9, 1e-13, 50.0
SMALLEST_DELTA = 1e-300  # upper bounds on a δ below this are this, as doubles soon end
_NOTHING = "exact (nothing about a record is released)"
_NO_NOISE = "exact (released without noise)"
_GAUSSIAN = "analytic Gaussian"
_ONE_RELEASE = "analytic Gaussian, amplified by sampling"
_LARGEST_EXPONENT = 600.0


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
    lower, estimate, upper = _gaussian_bounds(distance_without_sampling(parts), delta)
    return EpsilonBounds(
        lower=lower,
        estimate=estimate,
        upper=upper,
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


def one_sampled_release(mechanism: Mechanism) -> SampledGaussian | None:
    """Return the only release, if one is all and what it costs has a closed form.

    With q the chance of the record and H_a the hockey-stick divergence at a = e^ε,

        H_a((1 - q) N(0) + q N(1) ‖ N(0)) = q H_b(N(1) ‖ N(0))            b = 1 + (a - 1) / q
        H_a(N(0) ‖ (1 - q) N(0) + q N(1)) = c H_d(N(0) ‖ N(1))            d = a q / c

    with c = 1 - a (1 - q), or 0 where that is below 0. As c ≤ q and d ≥ b, removing a record never
    costs less than adding one.

    Source: Balle, Barthe, Gaboardi (2018), https://arxiv.org/abs/1807.01647, Theorem 2.
    """
    parts = live_parts(mechanism)
    if len(parts) != 1 or parts[0].steps != 1 or parts[0].records_per_unit > 1:
        return None
    part = parts[0]
    poisson = part.relation == "add_remove" and part.sampling == "poisson"
    return part if poisson and part.norms is None and part.noise_multiplier > 0 else None


def one_release_epsilon(part: SampledGaussian, delta: float) -> EpsilonBounds:
    """Return ε of one release of which `one_sampled_release` says that it has a closed form."""
    q = part.sampling_probability
    full = _gaussian_bounds(1 / part.noise_multiplier, delta / q) if delta < q else (0.0, 0.0, 0.0)
    lower, estimate, upper = (
        math.log1p(q * math.expm1(e)) if e < _LARGEST_EXPONENT else e + math.log(q) for e in full
    )
    return EpsilonBounds(
        lower=lower * (1 - _MARGIN),
        estimate=estimate,
        upper=upper * (1 + _MARGIN),
        delta=delta,
        direction="remove",
        method=_ONE_RELEASE,
    )


def one_release_delta(part: SampledGaussian, epsilon: float) -> DeltaBounds:
    """Return δ of one release of which `one_sampled_release` says that it has a closed form."""
    q, mu = part.sampling_probability, 1 / part.noise_multiplier
    large = epsilon >= _LARGEST_EXPONENT
    full = epsilon - math.log(q) if large else math.log1p(math.expm1(epsilon) / q)
    lower = q * gaussian_delta(full * (1 + _MARGIN), mu, -1)
    upper = max(q * gaussian_delta(full * (1 - _MARGIN), mu, +1), SMALLEST_DELTA)
    return replace(_delta(lower, upper, epsilon, _ONE_RELEASE), direction="remove")


def _gaussian_bounds(mu: float, delta: float) -> tuple[float, float, float]:
    """Return a number below, near, and above the ε of one Gaussian release."""
    near, target = gaussian_epsilon(mu, delta), math.log(delta)
    lower, upper, step = near * (1 - _MARGIN), near * (1 + _MARGIN), _MARGIN
    while lower > 0 and _log_delta_bound(lower, mu, -1) < target:
        step *= 2
        lower = max(near * (1 - step), 0.0)
    step = _MARGIN
    while math.isfinite(upper) and not _log_delta_bound(upper, mu, +1) <= target:
        step *= 2
        upper = near * (1 + step) + step**2 * mu
    return lower, near, upper


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
    value = math.exp(_log_delta_bound(epsilon, mu, sign))
    return min(max(value, SMALLEST_DELTA if sign > 0 else 0.0), 1.0)


def _log_delta_bound(epsilon: float, mu: float, sign: int) -> float:
    """Return log δ(ε) of one Gaussian release from above or below, however small it is."""
    moved = epsilon * (1 - sign * _MARGIN)
    value = gaussian_log_delta(moved, mu)
    # δ is the difference of two terms that nearly cancel where mu is small. They come from their
    # logarithms, whose rounding grows with them.
    log_first = float(log_ndtr(mu / 2 - moved / mu))
    log_rounding = math.log(_CANCELLATION) + math.log1p(min(-log_first, 1e9) / _LARGE_LOG)
    log_cancelled = log_first + log_rounding
    if value == -math.inf:
        return log_cancelled if sign > 0 else -math.inf
    slack = _DELTA_MARGIN + math.exp(min(log_cancelled - value, 1.0))
    return value + (math.log1p(sign * slack) if sign * slack > -1 else -math.inf)


def gaussian_upper(mu: float, delta: float) -> float:
    """Return an upper bound on the ε at `delta` of one Gaussian release."""
    return math.inf if math.isinf(mu) else _gaussian_bounds(mu, delta)[2]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return about ε at `delta` of one Gaussian release, of sensitivity `mu` times its noise."""
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
