"""Audit of one step of a mechanism from repetitions with and without a canary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, gammainc, ndtr, ndtri, stdtrit

from veilspan.accounting.audit.checks import check_confidence
from veilspan.accounting.audit.errors import check_statistics, most_errors
from veilspan.accounting.engines import CertifiedEngine
from veilspan.accounting.mechanism import SampledGaussian, check_delta, check_number

Array = NDArray[np.float64]
Verdict = Literal["consistent", "contradicted", "inconclusive"]

_TESTS = 3  # that share the chance of a false alarm
_LARGEST_MU = 20.0  # above it the engine has no lower bound, and ε no use


@dataclass(frozen=True, kw_only=True)
class WhiteBoxAudit:
    """What repetitions of one step say about its noise.

    All three bounds hold together with probability `confidence`, if the noise is Gaussian.

    Args:
        repetitions: Number of repetitions with and without the canary.
        confidence: Probability that no bound is false.
        claimed_noise_multiplier: σ that the mechanism is said to have.
        noise_multiplier: Measured standard deviation of the statistics.
        noise_multiplier_upper: The true one is at most this.
        contribution: Measured difference that the canary makes, in clip norms.
        contribution_upper: The true one is at most this.
        expected_contribution: What an honest mechanism would make of the canary.
        mu_lower: The step is not μ-GDP for any smaller μ; from the difference of the means.
        mu_lower_threshold: The same by counting errors at a threshold, whatever the noise's law.

    Guarantee:
        If the release is a Gaussian mechanism of noise multiplier at least the claimed one, with a
        contribution of at most one clip norm, `verdict` is "contradicted" with probability at most
        1 - `confidence`. "consistent" proves nothing: it is the absence of a contradiction.
    """

    repetitions: tuple[int, int]
    confidence: float
    claimed_noise_multiplier: float
    noise_multiplier: float
    noise_multiplier_upper: float
    contribution: float
    contribution_upper: float
    expected_contribution: float
    mu_lower: float
    mu_lower_threshold: float

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Say what cannot be true if the claim is."""
        claim, found = self.claimed_noise_multiplier, []
        if self.noise_multiplier_upper < claim:
            found.append(
                f"the noise multiplier is at most {self.noise_multiplier_upper:.4g}, not {claim:g}"
            )
        for name, mu in (
            ("difference of means", self.mu_lower),
            ("errors at a threshold", self.mu_lower_threshold),
        ):
            if mu * claim > 1:
                found.append(f"μ is at least {mu:.4g} by the {name}, not {1 / claim:.4g}")
        return tuple(found)

    @property
    def verdict(self) -> Verdict:
        """Return "inconclusive" where the canary is less than half of what was expected."""
        if self.contradictions:
            return "contradicted"
        if self.contribution_upper < self.expected_contribution / 2:
            return "inconclusive"
        return "consistent"

    def epsilon_lower(
        self, delta: float, *, sampling_probability: float = 1.0, steps: int = 1
    ) -> float:
        """Return the ε that `steps` such steps exceed, with probability `confidence`.

        Args:
            delta: The δ at which ε is meant; in (0, 1).
            sampling_probability: Chance of the canary to be in a step's sample. Below 1 the answer
                takes Poisson sampling for granted: repetitions of one batch do not see it.
            steps: Number of releases, each a Gaussian mechanism like the one measured.

        Raises:
            ValueError: If an argument is out of range.

        Guarantee:
            A lower bound on the ε of that composition if each step is a Gaussian mechanism and
            the bounds on μ hold.
        """
        check_delta(delta)
        mu = min(max(self.mu_lower, self.mu_lower_threshold), _LARGEST_MU)
        mechanism = SampledGaussian(
            noise_multiplier=1 / mu if mu > 0 else math.inf,
            sampling_probability=sampling_probability,
            steps=steps,
        )
        return CertifiedEngine().epsilon(mechanism, delta).lower


def audit_white_box(
    with_canary: Sequence[float] | Array,
    without_canary: Sequence[float] | Array,
    *,
    noise_multiplier: float,
    expected_contribution: float = 1.0,
    confidence: float = 0.95,
) -> WhiteBoxAudit:
    """Test one step of a mechanism against the noise multiplier that it is said to have.

    The canary is one record whose clipped gradient is `clip_norm` times a known unit vector u.
    Repeat one step, with the same model and batch and fresh noise, with and without it, and pass
    ⟨release, u⟩ / clip_norm of each, where the release is the noisy sum before it is divided.
    With 1000 repetitions each at a confidence of 0.95, 8 % too little noise is nearly always found.

    Args:
        with_canary: Statistics of the repetitions with the canary, at least 20.
        without_canary: Statistics of the repetitions without it, at least 20.
        noise_multiplier: Claimed σ, above 0.
        expected_contribution: Mean difference that an honest mechanism would show: 1, or the
            length of the part of u that the statistic looks at.
        confidence: One minus the chance of a false alarm; above 1/2 and below 1.

    Returns:
        Bounds and the verdict on the claim.

    Raises:
        ValueError: If statistics are too few or not finite, or a number is out of range.

    Guarantee:
        Three one-sided tests share the chance of a false alarm equally: of the noise's standard
        deviation (χ²), of μ by the difference of means (noncentral t, exact for Gaussian noise),
        of μ by false positives and negatives (Clopper-Pearson, for noise of any law; the first
        tenth of the statistics places the threshold and is not counted).

    Source: Nasr, Hayes, Steinke et al. (2023), https://arxiv.org/abs/2302.07956, Section 4, for
    μ from errors; Dong, Roth, Su (2019), https://arxiv.org/abs/1905.02383, for μ-GDP.

    Examples:
        >>> import numpy as np
        >>> noise = np.random.default_rng(0).standard_normal((2, 1000))
        >>> audit_white_box(noise[0] + 1, noise[1], noise_multiplier=1.0).verdict
        'consistent'
        >>> audit_white_box(0.8 * noise[0] + 1, 0.8 * noise[1], noise_multiplier=1.0).verdict
        'contradicted'
    """
    _check_above_zero("noise_multiplier", noise_multiplier)
    _check_above_zero("expected_contribution", expected_contribution)
    check_confidence(confidence)
    inside = check_statistics("with_canary", with_canary)
    outside = check_statistics("without_canary", without_canary)
    level = (1 - confidence) / _TESTS
    freedom = len(inside) + len(outside) - 2
    squares = np.square(inside - inside.mean()).sum() + np.square(outside - outside.mean()).sum()
    stddev = math.sqrt(squares / freedom)
    contribution = float(inside.mean() - outside.mean())
    per_sqrt = math.sqrt(1 / len(inside) + 1 / len(outside))
    return WhiteBoxAudit(
        repetitions=(len(inside), len(outside)),
        confidence=confidence,
        claimed_noise_multiplier=float(noise_multiplier),
        noise_multiplier=stddev,
        noise_multiplier_upper=math.sqrt(squares / float(chdtri(freedom, 1 - level))),
        contribution=contribution,
        contribution_upper=contribution + stddev * per_sqrt * float(stdtrit(freedom, 1 - level)),
        expected_contribution=float(expected_contribution),
        mu_lower=_mu_from_means(contribution, stddev * per_sqrt, freedom, level) * per_sqrt,
        mu_lower_threshold=_mu_from_errors(inside, outside, level),
    )


def _mu_from_means(difference: float, error: float, freedom: int, level: float) -> float:
    """Return the least noncentrality at which a t as large has a chance of `level`."""
    if difference <= 0:
        return 0.0
    if error < difference / 1e12:
        return math.inf  # no noise but rounding
    t = difference / error

    def miss(noncentrality: float) -> float:
        return _chance_of_larger(t, noncentrality, freedom) - level

    if miss(0.0) >= 0:
        return 0.0
    root: Any = brentq(miss, 0.0, t, xtol=1e-10 * t)
    return float(root) * (1 - 1e-8)


def _chance_of_larger(t: float, noncentrality: float, freedom: int) -> float:
    """Return P[(Z + noncentrality) / W > t], W² = χ²/freedom, by the smoother of two integrals."""
    width = 1 / math.sqrt(2 * freedom)  # of W around 1
    points = np.linspace(-9.0, 9.0, 301)  # as good as exact for what is smooth on this scale
    if t * width > 1:  # given Z
        weight = np.exp(-(points**2) / 2)
        ratio = np.maximum(points + noncentrality, 0.0) / t
        values = gammainc(freedom / 2, freedom * ratio**2 / 2)
    else:  # given W
        scale = np.exp(points * width)  # W in logarithmic steps; the density times W
        weight = np.exp(freedom * (np.log(scale) - (scale**2 - 1) / 2))
        values = ndtr(noncentrality - t * scale)
    return float(np.dot(weight, values) / weight.sum())


def _mu_from_errors(inside: Array, outside: Array, level: float) -> float:
    missed, alarms = most_errors(inside, outside, level)
    return max(float(-ndtri(alarms) - ndtri(missed)), 0.0)


def _check_above_zero(name: str, value: object) -> None:
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be above 0 and finite.")
