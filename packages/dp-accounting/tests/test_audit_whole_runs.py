"""Whole runs repeated: valid for any mechanism, and they see how records were sampled."""

import dataclasses
import math
import re

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.audit import audit_one_run, audit_whole_runs
from veilspan.accounting.audit.whole_runs import WholeRunsAudit

PLAN = PrivacyPlan(noise_multiplier=0.25, sampling_probability=0.1, steps=10, delta=1e-5)


def statistic(seen):
    """Log likelihood of having taken part in one of the steps, `[runs]`."""
    return np.logaddexp.reduce((seen - 0.5) / PLAN.noise_multiplier**2, axis=1)


def runs(rng, count, law, sigma=PLAN.noise_multiplier):
    """Statistics of `count` runs with and without one canary."""
    part = np.zeros((count, PLAN.steps))
    if law == "poisson":
        part[:] = rng.random(part.shape) < PLAN.sampling_probability
    else:
        part[np.arange(count), rng.integers(0, PLAN.steps, count)] = 1
    noise = sigma * rng.standard_normal((2, *part.shape))
    return statistic(part + noise[0]), statistic(noise[1])


def test_poisson_sampling_is_contradicted_at_most_at_the_stated_rate():
    rng = np.random.default_rng(0)
    audits = [audit_whole_runs(*runs(rng, 50, "poisson"), confidence=0.9) for _ in range(300)]
    assert binom.sf(sum(a.contradicts(PLAN) for a in audits) - 1, 300, 0.1) > 1e-5
    truth = PLAN.epsilon().upper
    assert max(a.epsilon_lower(1e-5) for a in audits) < truth


def test_shuffled_instead_of_poisson_is_contradicted_at_little_noise():
    """Power at least 0.9 with 100 runs each, where ε at a small δ would not show it."""
    rng = np.random.default_rng(1)
    audits = [audit_whole_runs(*runs(rng, 100, "shuffled")) for _ in range(40)]
    assert sum(a.contradicts(PLAN) for a in audits) >= 36
    assert all(a.epsilon_lower(PLAN.delta) < PLAN.epsilon().upper for a in audits)


def test_shuffled_instead_of_poisson_does_not_show_at_usual_noise():
    """At σ = 1 no number of runs that a test can afford tells the two apart."""
    rng = np.random.default_rng(2)
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.1, steps=10, delta=1e-5)
    assert not audit_whole_runs(*runs(rng, 2000, "shuffled", sigma=1.0)).contradicts(plan)


def test_epsilon_is_the_log_of_the_odds_and_grows_with_the_runs():
    rows = np.r_[np.zeros(100), np.ones(100)]
    bounds = []
    for count in (20, 100, 1000):
        audit = audit_whole_runs(np.ones(count), np.zeros(count))
        kept = count - count // 10
        most = 1 - 0.025 ** (1 / kept)  # Clopper-Pearson at no errors
        assert audit.missed_upper == pytest.approx(most)
        assert audit.alarms_upper == pytest.approx(most)
        bounds.append(audit.epsilon_lower(1e-5))
        assert bounds[-1] == pytest.approx(math.log((1 - 1e-5 - most) / most))
    assert bounds == sorted(bounds)
    mostly = np.r_[np.ones(60), np.zeros(140)][np.random.default_rng(0).permutation(200)]
    for rows_of in ((np.ones(200), mostly), (1 - mostly, np.zeros(200))):  # one rate is small
        audit = audit_whole_runs(*rows_of)
        small, large = sorted((audit.missed_upper, audit.alarms_upper))
        expected = math.log((1 - 1e-5 - large) / small)
        assert audit.epsilon_lower(1e-5) == pytest.approx(expected)
    assert audit_whole_runs(rows, rows).epsilon_lower(1e-5) == 0
    assert audit_whole_runs(np.zeros(50), np.ones(50)).epsilon_lower(1e-5) == 0


def test_bounds_on_the_errors_hold_at_the_stated_rate():
    rng, seeds, false = np.random.default_rng(4), 2000, 0
    for _ in range(seeds):
        inside, outside = (rng.random((2, 60)) < [[0.7], [0.2]]).astype(float)
        inside[:6], outside[:6] = 1.0, 0.0  # the threshold is 1/2
        audit = audit_whole_runs(inside, outside, confidence=0.8)
        false += audit.missed_upper < 0.3 or audit.alarms_upper < 0.2
    assert binom.sf(false - 1, seeds, 0.2) > 1e-5
    assert false > 0.03 * seeds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"with_canary": [1.0] * 19}, "with_canary has shape (19,)"),
        ({"without_canary": [math.nan] * 20}, "without_canary holds 20 numbers"),
        ({"confidence": 0.5}, "confidence is 0.5"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"with_canary": [1.0] * 20, "without_canary": [0.0] * 20} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_whole_runs(arguments.pop("with_canary"), arguments.pop("without_canary"), **arguments)
    with pytest.raises(ValueError, match="delta is 1"):
        audit_whole_runs([1.0] * 20, [0.0] * 20).epsilon_lower(1.0)


HONEST = {"noise_multiplier": 0.8, "sampling_probability": 0.3, "steps": 1, "delta": 1e-5}


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.5, 2.5])
@pytest.mark.parametrize(
    ("law", "moved", "instead"),
    [
        ({"relation": "replace"}, 1.0, -1.0),
        # Another record steps aside for the canary, and all others contribute -1.
        ({"relation": "replace", "sampling": "without_replacement"}, 2.0, 0.0),
        ({"sampling": "truncated_poisson", "batch_cap": 60, "most_records": 100}, 1.0, 0.0),
    ],
)
def test_exact_error_rates_of_an_honest_mechanism_contradict_no_relation(
    law, moved, instead, threshold
):
    plan = PrivacyPlan(**HONEST, **law)
    q, sigma = plan.sampling_probability, plan.noise_multiplier
    inside, outside = (
        q * ndtr((shift - threshold) / sigma) + (1 - q) * ndtr(-threshold / sigma)
        for shift in (moved, instead)
    )
    audit = WholeRunsAudit(
        runs=(1, 1), confidence=0.95, missed_upper=1 - inside, alarms_upper=outside
    )
    assert not audit.contradicts(plan)
    if threshold > 1:
        assert audit.contradicts(dataclasses.replace(plan, noise_multiplier=2 * sigma))


def test_one_run_is_held_against_the_relation_of_the_plan():
    rng = np.random.default_rng(3)
    plan = PrivacyPlan(
        noise_multiplier=1.0, sampling_probability=1.0, steps=1, delta=1e-5, relation="replace"
    )
    members = rng.random(3000) < 0.5
    scores = 2.0 * members - 1 + rng.standard_normal(3000)  # one value or its opposite
    audit = audit_one_run(scores, members, guesses=1500, delta=1e-5, family=plan)
    assert not audit.contradicts(plan)
    assert 1.0 < audit.epsilon_lower < plan.epsilon().lower
    assert audit.contradicts(dataclasses.replace(plan, relation="add_remove"))
