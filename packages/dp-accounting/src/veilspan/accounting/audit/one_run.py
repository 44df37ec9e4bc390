"""Audit of a mechanism from one run with many canaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.audit.checks import check_confidence
from veilspan.accounting.audit.guesses import chance_of_right, contradicts, count_right
from veilspan.accounting.audit.tradeoff import GaussianTradeOff, TradeOff, sampled_gaussian_curve
from veilspan.accounting.engines import CertifiedEngine
from veilspan.accounting.mechanism import SampledGaussian, check_delta
from veilspan.accounting.plan import PrivacyPlan

Array = NDArray[np.float64]

_LARGEST_EPSILON = 64.0
_LEAST_NOISE, _MOST_NOISE = 0.05, 1e3
_PRECISION = 4e-3  # of ε, and of the logarithm of a noise multiplier


@dataclass(frozen=True, kw_only=True)
class OneRunAudit:
    """What guesses about the canaries of one run say about its ε.

    Args:
        canaries: Number of canaries, put in or left out by fair coins.
        guesses: Number of guesses that decided; the other canaries were left open.
        right: How many of the guesses were right.
        tried: Numbers of guesses among which the best was taken; they share the error.
        epsilon_lower: The run is not (ε, `delta`)-differentially private for any smaller ε.
        delta: The δ that ε is meant at.
        confidence: Probability that the bound holds.
        family: The mechanisms for which it holds, in words.
    """

    canaries: int
    guesses: int
    right: int
    tried: tuple[int, ...]
    epsilon_lower: float
    delta: float
    confidence: float
    family: str

    def contradicts(self, plan: PrivacyPlan) -> bool:
        """Return whether the guesses contradict the trade-off curve of a plan.

        The curve says more than ε at one δ: it can be contradicted where `epsilon_lower` is small,
        and where ε at a small δ is large.

        Guarantee:
            If the mechanism keeps the plan, True has probability at most 1 - `confidence`.
        """
        curve = sampled_gaussian_curve(_mechanism(plan, plan.noise_multiplier))
        level = (1 - self.confidence) / len(self.tried)
        return contradicts(curve, self.canaries, self.guesses, self.right, level=level)


def audit_one_run(
    scores: Sequence[float] | Array,
    members: Sequence[bool] | NDArray[np.bool_],
    *,
    guesses: int | Sequence[int],
    delta: float,
    confidence: float = 0.95,
    family: str | PrivacyPlan = "any",
) -> OneRunAudit:
    """Bound the ε of a mechanism from below by one run with canaries.

    Throw a fair coin for each canary, train once with those that are in, score how much the result
    looks as if each were in. The highest scores are guessed to be in, as many of the lowest out.

    Args:
        scores: One per canary, larger where it seems to be in, `[m]`.
        members: Whether each is in, by independent fair coins, `[m]`.
        guesses: How many guesses to make, fixed before the scores are looked at; or several
            numbers, of which the best counts, and which share the error probability.
        delta: The δ at which ε is meant; in (0, 1).
        confidence: Probability that the bound holds; above 1/2 and below 1.
        family: "any" assumes nothing. Others give more, but only for a mechanism that belongs to
            them: "gaussian", whose trade-off curve is a Gaussian's, as with every record in every
            step; or a plan with exact norms, for mechanisms that differ from it in the noise
            multiplier alone, which takes some seconds.

    Returns:
        The bound with the guesses it comes from; 0 where they prove nothing.

    Raises:
        ValueError: If the rows do not fit each other, or a value is out of range.

    Guarantee:
        `epsilon_lower` is above the true ε with probability at most 1 - `confidence`, if the coins
        are fair, independent and known to the scores through the mechanism's output only.

    Source: Steinke, Nasr, Jagielski (2023), https://arxiv.org/abs/2305.08846, for "any";
    Mahloujifar, Melis, Chaudhuri (2024), https://arxiv.org/abs/2410.22235, for the others.

    Examples:
        >>> import numpy as np
        >>> members = np.random.default_rng(0).random(1000) < 0.5
        >>> audit = audit_one_run(1.0 * members, members, guesses=100, delta=1e-5)
        >>> audit.right, round(audit.epsilon_lower, 1)
        (100, 3.5)
    """
    values, inside = _rows(scores, members)
    tried = _numbers_of_guesses(guesses, len(values))
    check_delta(delta)
    check_confidence(confidence)
    bound = _bound(family)
    level = (1 - confidence) / len(tried)

    def audit(number: int) -> OneRunAudit:
        right = count_right(values, inside, guesses=number)
        return OneRunAudit(
            canaries=len(values),
            guesses=number,
            right=right,
            tried=tried,
            epsilon_lower=bound((len(values), number, right), delta, level),
            delta=delta,
            confidence=confidence,
            family=family if isinstance(family, str) else "the plan with other noise",
        )

    return max(map(audit, tried), key=lambda found: found.epsilon_lower)


_Counts = tuple[int, int, int]  # canaries, guesses, right


def _bound(family: str | PrivacyPlan) -> Callable[[_Counts, float, float], float]:
    if isinstance(family, PrivacyPlan):
        if family.norms is not None:
            raise ValueError(
                "family is a plan with estimated norms, whose counted law is a bound that the "
                "mechanism need not reach; use family='any', or a plan with exact norms."
            )
        sampled = partial(_mechanism, family)
        return partial(_bound_within, lambda sigma: sampled_gaussian_curve(sampled(sigma)), sampled)
    if family == "gaussian":
        whole = PrivacyPlan(noise_multiplier=1.0, sampling_probability=1.0, steps=1, delta=0.5)
        return partial(
            _bound_within, lambda sigma: GaussianTradeOff(mu=1 / sigma), partial(_mechanism, whole)
        )
    if family == "any":
        return _bound_for_any
    raise ValueError(f"family is {family!r}; it must be 'any', 'gaussian' or a PrivacyPlan.")


def _bound_for_any(counts: _Counts, delta: float, level: float) -> float:
    def contradicted(epsilon: float) -> bool:
        return chance_of_right(*counts, epsilon=epsilon, delta=delta) < level

    return _last(contradicted, 0.0, _LARGEST_EPSILON)


def _bound_within(
    curve: Callable[[float], TradeOff],
    mechanism: Callable[[float], SampledGaussian],
    counts: _Counts,
    delta: float,
    level: float,
) -> float:
    """Return ε of the mechanism with the least noise that the guesses contradict."""

    def contradicted(log_precision: float) -> bool:
        return contradicts(curve(math.exp(-log_precision)), *counts, level=level)

    least, most = (-math.log(sigma) for sigma in (_MOST_NOISE, _LEAST_NOISE))
    log_precision = _last(contradicted, least, most)
    if log_precision == least:
        return 0.0
    return CertifiedEngine().epsilon(mechanism(math.exp(-log_precision)), delta).lower


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return about the largest number up to which `holds`, never a larger one; or `low`."""
    if not holds(low):
        return low
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _mechanism(plan: PrivacyPlan, noise_multiplier: float) -> SampledGaussian:
    return replace(plan, noise_multiplier=noise_multiplier).mechanism(plan.steps)


def _rows(scores: Any, members: Any) -> tuple[Array, NDArray[np.bool_]]:
    values, inside = np.asarray(scores), np.asarray(members)
    if values.ndim != 1 or inside.shape != values.shape or values.dtype.kind not in "iuf":
        raise ValueError(
            f"scores has shape {values.shape} and dtype {values.dtype}, members has shape "
            f"{inside.shape}; they must be two rows of the same length, with one number and one "
            "flag for each canary."
        )
    if np.isnan(values).any():
        raise ValueError(
            f"scores holds {np.count_nonzero(np.isnan(values))} NaN; give each canary a number. "
            "Leave none out after looking at the scores: that would make the bound false."
        )
    if inside.dtype.kind not in "biu" or not np.isin(inside, (0, 1)).all():
        raise ValueError(
            f"members has dtype {inside.dtype}; it must hold True or 1 for the canaries that are "
            "in, and False or 0 for the others."
        )
    return values.astype(np.float64), inside.astype(bool)


def _numbers_of_guesses(guesses: int | Sequence[int], canaries: int) -> tuple[int, ...]:
    tried = tuple(np.atleast_1d(np.asarray(guesses)).tolist())
    if not tried or len(set(tried)) < len(tried):
        raise ValueError(
            f"guesses is {guesses!r}; it must be one number or several, all different."
        )
    for number in tried:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 1 <= number <= canaries:
            raise ValueError(
                f"guesses is {number!r}; it must be a whole number from 1 to {canaries}, the "
                "number of canaries."
            )
    return tried
