"""Guesses about the canaries of one run: valid bounds, with the power that the papers promise."""

import math
import re
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.audit import OneRunAudit, audit_one_run
from veilspan.accounting.audit.guesses import chance_of_right, contradicts, count_right
from veilspan.accounting.audit.tradeoff import GaussianTradeOff, sampled_gaussian_curve
from veilspan.accounting.engines import SampledGaussian
from veilspan.accounting.engines.closed_form import gaussian_epsilon

PLAN = PrivacyPlan(noise_multiplier=0.6, sampling_probability=0.05, steps=40, delta=1e-5)


class PureTradeOff:
    """The curve of (ε, 0): randomised response reaches it."""

    def __init__(self, epsilon):
        self.epsilon = epsilon

    def least_missed(self, found):
        growth = math.exp(self.epsilon)
        return max(found / growth, 1 - growth * (1 - found), 0.0)


def gaussian_run(rng, mu, canaries):
    """Scores of a mechanism that releases each bit with noise of standard deviation 1/μ."""
    members = rng.random(canaries) < 0.5
    return rng.standard_normal(canaries) + mu * members, members


def mu_of(epsilon, delta=1e-5):
    root: Any = brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, 1e-3, 30.0)
    return float(root)


def fewest_contradicting(curve, canaries, guesses, level):
    """Fewest right guesses that contradict a curve, by bisection, or None."""
    low, high = 0, guesses
    if not contradicts(curve, canaries, guesses, high, level=level):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        bad = contradicts(curve, canaries, guesses, middle, level=level)
        low, high = (low, middle) if bad else (middle, high)
    return high


# Never too large


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [10, 100, 1000])
@pytest.mark.parametrize("level", [0.01, 0.05])
def test_randomised_response_is_contradicted_at_most_at_the_stated_rate(epsilon, guesses, level):
    """Exactly: the number of right guesses is binomial, and at δ = 0 no bound is tighter."""
    law = binom(guesses, expit(epsilon))
    right = np.arange(guesses + 1)
    chances = [chance_of_right(guesses, guesses, v, epsilon=epsilon, delta=0.0) for v in right]
    assert np.allclose(chances, law.sf(right - 1), rtol=1e-9)
    fewest = fewest_contradicting(PureTradeOff(epsilon), guesses, guesses, level)
    if fewest is not None:
        assert law.sf(fewest - 1) <= level


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_revealing_with_probability_delta_is_within_the_stated_rate(epsilon):
    """Randomised response that shows each bit in the open with probability δ is (ε, δ)."""
    canaries, delta, level = 200, 0.02, 0.05
    law = binom(canaries, delta + (1 - delta) * expit(epsilon))
    for right in range(canaries + 1):
        bound = chance_of_right(canaries, canaries, right, epsilon=epsilon, delta=delta)
        assert law.sf(right - 1) <= bound + 1e-12
        assert bound > level or law.sf(right - 1) <= level


@pytest.mark.parametrize(
    ("epsilon", "canaries", "guesses"), [(1.0, 200, 200), (2.0, 1000, 100), (4.0, 1000, 1000)]
)
def test_gaussian_mechanism_is_contradicted_at_most_at_the_stated_rate(epsilon, canaries, guesses):
    mu, seeds, level, rng = mu_of(epsilon), 1500, 0.1, np.random.default_rng(canaries)
    runs = (gaussian_run(rng, mu, canaries) for _ in range(seeds))
    right = np.array([count_right(*run, guesses=guesses) for run in runs])
    fewest = fewest_contradicting(GaussianTradeOff(mu=mu), canaries, guesses, level)
    assert fewest is not None
    assert binom.sf((right >= fewest).sum() - 1, seeds, level) > 1e-5
    counts = range(guesses + 1)
    false = [
        chance_of_right(canaries, guesses, v, epsilon=epsilon, delta=1e-5) < level for v in counts
    ]
    assert binom.sf(np.array(false)[right].sum() - 1, seeds, level) > 1e-5


def test_scores_without_information_prove_nothing_more_often_than_stated():
    rng, seeds = np.random.default_rng(5), 300
    false = 0
    for _ in range(seeds):
        scores, members = gaussian_run(rng, 0.0, 300)
        audit = audit_one_run(scores, members, guesses=[20, 100, 300], delta=1e-6, confidence=0.9)
        false += audit.epsilon_lower > 0
    assert binom.sf(false - 1, seeds, 0.1) > 1e-5


def test_equal_scores_count_against_the_auditor_in_every_order():
    members = np.arange(400) < 200
    for order in (members, ~members):
        audit = audit_one_run(np.zeros(400), order, guesses=400, delta=1e-6)
        assert (audit.right, audit.epsilon_lower) == (0, 0.0)
    scores = np.repeat([0.0, 1.0], 200)
    assert count_right(scores, scores > 0, guesses=100) == 100
    scores[:50], mixed = 1.0, scores > 0
    mixed[:50] = False
    assert count_right(scores, mixed, guesses=100) == 50  # all guesses "in" can be wrong


# Power


@pytest.mark.parametrize(
    ("epsilon", "canaries", "published", "gaussian"),
    [
        (1, 1000, 0.30, 0.48),
        (2, 1000, 0.65, 1.07),
        (4, 1000, 1.79, 2.60),
        (8, 1000, 3.00, 4.73),
        (16, 1000, 4.57, 8.37),
        (8, 100, 1.74, 3.28),
        (4, 10000, 1.97, 2.54),
    ],
)
def test_power_is_that_of_reference_implementations(epsilon, canaries, published, gaussian):
    """Median of 15 runs at the best of four fixed numbers of guesses, at δ = 1e-5 and 95 %."""
    rng, mu = np.random.default_rng(epsilon), mu_of(epsilon)
    runs = [gaussian_run(rng, mu, canaries) for _ in range(15 if canaries < 10000 else 3)]

    def best(family):
        return max(
            median(
                audit_one_run(*run, guesses=count, delta=1e-5, family=family).epsilon_lower
                for run in runs
            )
            for count in (canaries // 50, canaries // 10, canaries * 3 // 10, canaries)
        )

    assert 0.65 * published < best("any") < epsilon
    assert 0.65 * gaussian < best("gaussian") < epsilon


def test_a_plan_as_family_bounds_epsilon_below_the_truth_and_above_any():
    """Scores are the likelihood ratios of the plan's own mechanism, one canary per coordinate."""
    rng, canaries = np.random.default_rng(11), 1000
    members = rng.random(canaries) < 0.5
    sigma, q = PLAN.noise_multiplier, PLAN.sampling_probability
    drawn = (rng.random((PLAN.steps, canaries)) < q) & members
    seen = drawn + sigma * rng.standard_normal(drawn.shape)
    scores = np.log1p(q * np.expm1((seen - 0.5) / sigma**2)).sum(0)
    by_plan = audit_one_run(scores, members, guesses=300, delta=1e-5, family=PLAN)
    by_any = audit_one_run(scores, members, guesses=300, delta=1e-5)
    truth = PLAN.epsilon().upper
    assert 0.25 * truth < by_plan.epsilon_lower < truth
    assert by_any.epsilon_lower < by_plan.epsilon_lower
    assert not by_plan.contradicts(PLAN)
    quieter = PrivacyPlan(noise_multiplier=1.5, sampling_probability=q, steps=40, delta=1e-5)
    assert by_plan.epsilon_lower > quieter.epsilon().upper
    assert by_plan.contradicts(quieter)
    assert by_any.contradicts(quieter)


# Laws


counts = st.integers(20, 400).flatmap(
    lambda m: st.tuples(st.just(m), st.integers(1, m)).flatmap(
        lambda c: st.tuples(st.just(c[0]), st.just(c[1]), st.integers(0, c[1] - 1))
    )
)


@settings(max_examples=150, deadline=None)
@given(counts=counts, epsilon=st.floats(0.0, 8.0), log_delta=st.floats(-12.0, -1.0))
def test_chance_falls_with_right_guesses_and_grows_with_epsilon_delta_and_canaries(
    counts, epsilon, log_delta
):
    canaries, guesses, right = counts
    delta = 10.0**log_delta
    chance = chance_of_right(canaries, guesses, right, epsilon=epsilon, delta=delta)
    rounding = chance * (1 + 1e-9) + 1e-12
    assert chance_of_right(canaries, guesses, right + 1, epsilon=epsilon, delta=delta) <= rounding
    for change in ({"delta": 2 * delta}, {"epsilon": epsilon + 0.5}):
        more = {"epsilon": epsilon, "delta": delta} | change
        if chance < 0.2 and (delta < 1e-6 or "delta" in change):
            assert chance_of_right(canaries, guesses, right, **more) >= chance * (1 - 1e-9)
    more = chance_of_right(canaries + 1, guesses, right, epsilon=epsilon, delta=delta)
    assert more >= chance * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(counts=counts, mu=st.floats(0.05, 6.0))
def test_what_contradicts_a_curve_contradicts_every_more_private_one(counts, mu):
    canaries, guesses, right = counts
    if contradicts(GaussianTradeOff(mu=mu), canaries, guesses, right, level=0.05):
        assert contradicts(GaussianTradeOff(mu=0.8 * mu), canaries, guesses, right, level=0.05)
        assert contradicts(GaussianTradeOff(mu=mu), canaries, guesses, right + 1, level=0.05)
        assert contradicts(GaussianTradeOff(mu=mu), canaries, guesses, right, level=0.1)


@pytest.mark.parametrize("family", ["any", "gaussian"])
def test_bound_is_monotone_in_confidence_and_does_not_depend_on_the_order(family):
    rng = np.random.default_rng(2)
    scores, members = gaussian_run(rng, 2.0, 500)
    ask = {"guesses": 200, "delta": 1e-5, "family": family}
    bounds = [
        audit_one_run(scores, members, **ask, confidence=c).epsilon_lower
        for c in (0.8, 0.95, 0.999)
    ]
    assert bounds[0] > bounds[1] > bounds[2] > 0
    order = rng.permutation(500)
    again = audit_one_run(scores[order], members[order], **ask)
    assert again == audit_one_run(scores, members, **ask)
    assert audit_one_run(3 * scores - 1, members.astype(int), **ask) == again


def test_several_numbers_of_guesses_share_the_error():
    scores, members = gaussian_run(np.random.default_rng(3), 3.0, 1000)
    tried = (50, 200, 1000)
    audit = audit_one_run(scores, members, guesses=tried, delta=1e-5)
    alone = [
        audit_one_run(scores, members, guesses=g, delta=1e-5, confidence=1 - 0.05 / 3)
        for g in tried
    ]
    assert audit.epsilon_lower == max(a.epsilon_lower for a in alone)
    assert audit.tried == tried
    assert audit.guesses in tried
    once = audit_one_run(scores, members, guesses=audit.guesses, delta=1e-5)
    assert once.epsilon_lower > audit.epsilon_lower


def test_the_test_of_a_plan_shares_the_error_too():
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=1.0, steps=1, delta=1e-5)
    curve = sampled_gaussian_curve(
        SampledGaussian(noise_multiplier=1.0, sampling_probability=1.0, steps=1)
    )
    alone = fewest_contradicting(curve, 1000, 300, 0.05)
    shared = fewest_contradicting(curve, 1000, 300, 0.05 / 4)
    assert alone is not None
    assert shared is not None
    assert alone < shared
    values = {"canaries": 1000, "guesses": 300, "epsilon_lower": 0.0, "delta": 1e-5}
    values |= {"confidence": 0.95, "family": "any"}
    for tried, fewest in (((300,), alone), ((300, 10, 20, 30), shared)):
        for right, expected in ((fewest - 1, False), (fewest, True)):
            audit = OneRunAudit(**values, tried=tried, right=right)
            assert audit.contradicts(plan) == expected


def test_shuffled_instead_of_poisson_does_not_show_in_one_run():
    """Not even where there is next to no noise and nearly every guess is right."""
    rng = np.random.default_rng(6)
    plan = PrivacyPlan(noise_multiplier=0.1, sampling_probability=0.05, steps=20, delta=1e-5)
    members = rng.random(1000) < 0.5
    drawn = (rng.integers(0, 20, 1000) == np.arange(20)[:, None]) & members
    seen = drawn + 0.1 * rng.standard_normal(drawn.shape)
    scores = np.logaddexp.reduce((seen - 0.5) / 0.1**2, axis=0)
    audit = audit_one_run(scores, members, guesses=800, delta=1e-5)
    assert audit.right >= 798
    assert not audit.contradicts(plan)


# Curves


@settings(max_examples=100, deadline=None)
@given(sigma=st.sampled_from([0.5, 1.0, 3.0]), found=st.floats(0.0, 1.0))
def test_curve_without_sampling_is_just_below_the_gaussian_one(sigma, found):
    below = _curve(sigma, 1.0).least_missed(found)
    exact = GaussianTradeOff(mu=1 / sigma).least_missed(found)
    assert below <= exact + 1e-12
    assert below >= exact - 0.02


@settings(max_examples=100, deadline=None)
@given(threshold=st.floats(-3.0, 5.0))
@pytest.mark.parametrize(("sigma", "q"), [(0.4, 0.3), (1.0, 0.05), (0.3, 0.5)])
def test_no_test_of_one_step_beats_the_curve_in_either_direction(threshold, sigma, q):
    """The best tests of one sampled step are thresholds."""
    alarms = float(ndtr(-threshold / sigma))
    found = (1 - q) * alarms + q * float(ndtr((1 - threshold) / sigma))
    curve = _curve(sigma, q)
    assert curve.least_missed(found) <= alarms + 1e-12
    if alarms > 1e-9:  # else 1 - alarms is rounded by more than the curve forgives
        assert curve.least_missed(1 - alarms) <= 1 - found + 1e-6
    if threshold >= 0.5:  # elsewhere the other direction decides the curve
        assert curve.least_missed(found) >= alarms - 0.02


def _curve(sigma, q):
    return sampled_gaussian_curve(
        SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1)
    )


def test_without_noise_nothing_can_be_contradicted_and_without_sampling_everything():
    none = sampled_gaussian_curve(
        SampledGaussian(noise_multiplier=0.0, sampling_probability=0.5, steps=1)
    )
    assert not contradicts(none, 1000, 1000, 1000, level=0.05)
    unsampled = sampled_gaussian_curve(
        SampledGaussian(noise_multiplier=1.0, sampling_probability=0.0, steps=1)
    )
    assert contradicts(unsampled, 1000, 1000, 700, level=0.05)
    assert unsampled.least_missed(0.3) == pytest.approx(0.3, abs=1e-9)
    assert GaussianTradeOff(mu=0.0).least_missed(0.3) == pytest.approx(0.3)
    assert GaussianTradeOff(mu=1.0).least_missed(0.3) == pytest.approx(ndtr(ndtri(0.3) - 1))


ROWS = {"scores": [0.1, 0.2, 0.3, 0.4], "members": [True, False, True, False]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.1]}, "scores has shape (1,)"),
        ({"scores": [[0.1] * 4]}, "scores has shape (1, 4)"),
        ({"scores": ["a"] * 4}, "dtype <U1"),
        ({"scores": [math.nan] * 4}, "scores holds 4 NaN"),
        ({"members": [0, 1, 2, 1]}, "members has dtype int64"),
        ({"members": [0.0, 1.0, 0.0, 1.0]}, "members has dtype float64"),
        ({"guesses": 0}, "guesses is 0"),
        ({"guesses": 5}, "guesses is 5; it must be a whole number from 1 to 4"),
        ({"guesses": True}, "guesses is True"),
        ({"guesses": 2.5}, "guesses is 2.5"),
        ({"guesses": []}, "guesses is []"),
        ({"guesses": [2, 2]}, "guesses is [2, 2]"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"family": "laplace"}, "family is 'laplace'; it must be"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {**ROWS, "guesses": 2, "delta": 1e-5, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_one_run(arguments.pop("scores"), arguments.pop("members"), **arguments)
    with pytest.raises(ValueError, match="mu is -1"):
        GaussianTradeOff(mu=-1)
