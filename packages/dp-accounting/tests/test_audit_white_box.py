"""Repetitions of one step: rarely a false alarm, nearly always an alarm where noise is missing."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, ndtri
from scipy.stats import binom, chi, chi2, t

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.audit import audit_white_box
from veilspan.accounting.audit.white_box import _chance_of_larger
from veilspan.accounting.engines.closed_form import gaussian_epsilon

rng_of = np.random.default_rng


def audits(seeds, *, sigma, n=1000, shortfall=1.0, contribution=1.0, confidence=0.9):
    """Audit many times a Gaussian mechanism that claims σ and has `shortfall` times as much."""
    rng = rng_of([seeds, n])
    for _ in range(seeds):
        noise = rng.standard_normal((2, n)) * sigma * shortfall
        yield audit_white_box(
            5.0 + contribution + noise[0],
            5.0 + noise[1],
            noise_multiplier=sigma,
            confidence=confidence,
        )


def too_many(events, trials, chance):
    """Whether so many events happen less than once in 10⁵ times by chance."""
    return binom.sf(events - 1, trials, chance) < 1e-5


@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("n", [20, 1000])
def test_honest_mechanism_is_contradicted_at_most_at_the_stated_rate(sigma, n):
    seeds, level = 1000, 0.1 / 3
    found = list(audits(seeds, sigma=sigma, n=n))
    assert not too_many(sum(a.verdict == "contradicted" for a in found), seeds, 0.1)
    for bound in (
        [a.noise_multiplier_upper < sigma for a in found],
        [a.mu_lower * sigma > 1 for a in found],
        [a.mu_lower_threshold * sigma > 1 for a in found],
    ):
        assert not too_many(sum(bound), seeds, level)
    exact = (
        [a.noise_multiplier_upper < sigma for a in found],
        [a.mu_lower * sigma > 1 for a in found],
    )
    for bound in exact:  # these two are exact, not merely valid
        assert binom.cdf(sum(bound), seeds, level) > 1e-5


@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0])
def test_eight_percent_too_little_noise_is_found_at_a_thousand_repetitions(sigma):
    """Power at least 0.98 at a confidence of 0.95, whatever σ."""
    found = [a.verdict for a in audits(300, sigma=sigma, shortfall=0.92, confidence=0.95)]
    assert found.count("contradicted") >= 0.98 * 300


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_a_record_that_counts_twice_is_found_with_full_noise(sigma):
    found = list(audits(100, sigma=sigma, contribution=2.0, confidence=0.95))
    assert sum(a.verdict == "contradicted" for a in found) >= 98
    assert sum("difference of means" in str(a.contradictions) for a in found) >= 98


def test_power_of_both_bounds_on_mu():
    """Median bound over μ = 1: 0.90 from means, 0.78 from errors, at a third of the level each."""
    found = list(audits(200, sigma=1.0, confidence=0.95))
    assert 0.87 < np.median([a.mu_lower for a in found]) < 0.93
    assert 0.74 < np.median([a.mu_lower_threshold for a in found]) < 0.83


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_bound_from_errors_holds_for_noise_that_is_not_gaussian(scale):
    """Laplace noise: no threshold does better than the middle, whose errors are known."""
    rng, seeds, n = rng_of(3), 500, 1000
    mu = -2 * ndtri(math.exp(-0.5 / scale) / 2)
    found = [
        audit_white_box(
            1 + rng.laplace(scale=scale, size=n), rng.laplace(scale=scale, size=n),
            noise_multiplier=1.0, confidence=0.9,
        ).mu_lower_threshold
        for _ in range(seeds)
    ]  # fmt: skip
    assert not too_many(sum(bound > mu for bound in found), seeds, 0.1 / 3)
    assert np.median(found) > 0.6 * mu


@pytest.mark.parametrize("contribution", [0.0, -1.0, 0.3])
def test_canary_that_does_not_reach_the_release_is_inconclusive(contribution):
    for audit in audits(20, sigma=1.0, contribution=contribution):
        assert audit.verdict == "inconclusive"
        assert audit.contradictions == ()


def test_part_of_a_canary_is_measured_against_its_part():
    noise = rng_of(0).standard_normal((2, 1000))
    audit = audit_white_box(
        noise[0] + 0.3, noise[1], noise_multiplier=1.0, expected_contribution=0.3
    )
    assert audit.verdict == "consistent"


def test_no_noise_has_no_bound_and_a_huge_epsilon():
    audit = audit_white_box([1.0] * 20, [0.0] * 20, noise_multiplier=1.0)
    assert audit.mu_lower == math.inf
    assert audit.noise_multiplier_upper == 0
    assert audit.verdict == "contradicted"
    assert audit.epsilon_lower(1e-6) > 200
    assert audit.epsilon_lower(1e-6, sampling_probability=0.01, steps=100) > 200


@pytest.mark.parametrize("noise", [1e-3, 1e-9, 1e-14])
def test_bounds_scale_with_vanishing_noise(noise):
    rows = rng_of(1).standard_normal((2, 50))
    audit = audit_white_box(1 + noise * rows[0], noise * rows[1], noise_multiplier=noise)
    assert 0.6 / noise < audit.mu_lower
    assert audit.mu_lower < 1.01 / noise or math.isinf(audit.mu_lower)


def test_epsilon_follows_the_bound_on_mu_and_composes():
    noise = rng_of(7).standard_normal((2, 1000))
    audit = audit_white_box(noise[0] + 1, noise[1], noise_multiplier=1.0)
    mu = max(audit.mu_lower, audit.mu_lower_threshold)
    for steps in (1, 9):
        expected = gaussian_epsilon(mu * math.sqrt(steps), 1e-5)
        assert audit.epsilon_lower(1e-5, steps=steps) == pytest.approx(expected, rel=1e-6)
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.01, steps=500, delta=1e-5)
    measured = audit.epsilon_lower(1e-5, sampling_probability=0.01, steps=500)
    assert 0.6 * plan.epsilon().upper < measured <= plan.epsilon().upper
    inconclusive = audit_white_box(noise[0], noise[1] + 1, noise_multiplier=1.0)
    assert inconclusive.epsilon_lower(1e-5) == 0


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shift=st.floats(-100.0, 100.0),
    factor=st.sampled_from([0.125, 0.5, 4.0]),
)
def test_only_the_ratio_of_contribution_and_noise_decides_mu(seed, shift, factor):
    rows = rng_of(seed).standard_normal((2, 60))
    one = audit_white_box(rows[0] + 1, rows[1], noise_multiplier=1.0)
    other = audit_white_box(
        factor * (rows[0] + 1) + shift, factor * rows[1] + shift, noise_multiplier=1.0
    )
    assert other.mu_lower == pytest.approx(one.mu_lower, rel=1e-6, abs=1e-9)
    assert other.noise_multiplier_upper == pytest.approx(factor * one.noise_multiplier_upper)


def chance_of_larger_t(value, noncentrality, freedom):
    """By quadrature over the standard deviation, whose law is a χ distribution."""

    def weighted(w):
        density = chi.pdf(w * math.sqrt(freedom), freedom) * math.sqrt(freedom)
        return ndtr(noncentrality - value * w) * density

    reach = 9 / math.sqrt(2 * freedom)
    step = min(max(noncentrality / value, 1 - reach), 1 + reach)
    ends = max(1 - reach, 0.0), 1 + reach
    return quad(weighted, *ends, points=[step, 1.0], limit=500, epsabs=1e-12)[0]


@settings(max_examples=60, deadline=None)
@given(value=st.floats(0.1, 200.0), share=st.floats(0.0, 1.0), freedom=st.integers(38, 5000))
def test_chance_of_a_larger_t_is_that_of_the_noncentral_law(value, share, freedom):
    expected = chance_of_larger_t(value, share * value, freedom)
    assert _chance_of_larger(value, share * value, freedom) == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


def test_bound_on_the_noise_is_the_quantile_of_its_law():
    rows = rng_of(3).standard_normal((2, 30))
    audit = audit_white_box(rows[0] + 1, rows[1, :25], noise_multiplier=1.0, confidence=0.94)
    squares = 29 * rows[0].var(ddof=1) + 24 * rows[1, :25].var(ddof=1)
    assert audit.noise_multiplier == pytest.approx(math.sqrt(squares / 53))
    assert audit.noise_multiplier_upper == pytest.approx(math.sqrt(squares / chi2.ppf(0.02, 53)))
    error = audit.noise_multiplier * math.sqrt(1 / 30 + 1 / 25)
    assert audit.contribution_upper == pytest.approx(audit.contribution + t.ppf(0.98, 53) * error)
    noncentrality = audit.mu_lower / math.sqrt(1 / 30 + 1 / 25)
    found = chance_of_larger_t(audit.contribution / error, noncentrality, 53)
    assert found == pytest.approx(0.02, rel=1e-4)


def test_errors_at_the_threshold_are_counted_on_other_repetitions():
    """The first tenth places the threshold and may be anything that leaves it in the middle."""
    rows = rng_of(2).standard_normal((2, 100))
    rows[0] += 1
    one = audit_white_box(rows[0], rows[1], noise_multiplier=1.0)
    middle = (rows[0, :10].mean() + rows[1, :10].mean()) / 2
    rows[0, :10], rows[1, :10] = middle + 50, middle - 50
    other = audit_white_box(rows[0], rows[1], noise_multiplier=1.0)
    assert other.mu_lower_threshold == one.mu_lower_threshold > 0
    best = -2 * ndtri(1 - ndtr(0.5))
    assert one.mu_lower_threshold < best


GOOD = [0.0, 1.0] * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"with_canary": GOOD[:-1]}, "with_canary has shape (19,)"),
        ({"without_canary": []}, "without_canary has shape (0,)"),
        ({"with_canary": [GOOD, GOOD]}, "with_canary has shape (2, 20)"),
        ({"with_canary": ["a"] * 20}, "with_canary has shape (20,) and dtype <U1"),
        ({"without_canary": [True] * 20}, "dtype bool"),
        ({"without_canary": [math.nan, *GOOD]}, "without_canary holds 1 numbers that are not"),
        ({"with_canary": [math.inf, *GOOD]}, "with_canary holds 1 numbers that are not"),
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0; it must be above 0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"expected_contribution": -1.0}, "expected_contribution is -1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 0.05}, "confidence is 0.05"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"with_canary": GOOD, "without_canary": GOOD, "noise_multiplier": 1.0} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_white_box(arguments.pop("with_canary"), arguments.pop("without_canary"), **arguments)
    with pytest.raises(ValueError, match="delta is 0"):
        audit_white_box(GOOD, GOOD, noise_multiplier=1.0).epsilon_lower(0.0)
