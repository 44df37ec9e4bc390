"""Units of several records are counted exactly, each record drawn by itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from veilspan.accounting import Phases, PrivacyPlan
from veilspan.accounting.engines import (
    CertifiedEngine,
    EngineError,
    PldEngine,
    RdpEngine,
    SampledGaussian,
)
from veilspan.accounting.engines.closed_form import gaussian_epsilon
from veilspan.accounting.engines.likely_number import likely_delta, likely_epsilon
from veilspan.accounting.engines.prv import PrvEngine
from veilspan.accounting.engines.records_step import number_atoms, number_law

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
ONE_SIDED = CertifiedEngine(pld=PldEngine(one_sided=True))
SETTINGS = {"sampling_probability": 0.01, "steps": 200, "delta": 1e-5}
PLAN = PrivacyPlan(noise_multiplier=1.0, unit="user", records_per_unit=5, **SETTINGS)


def release(k, *, q=0.01, sigma=1.0, steps=1, **rest):
    return SampledGaussian(
        noise_multiplier=sigma, sampling_probability=q, steps=steps, records_per_unit=k, **rest
    )


def exact_delta(direction, epsilon, k, q, sigma):
    """δ of one release in which each of k equal records is drawn with chance q."""
    number = np.arange(k + 1)
    log_chance = stats.binom.logpmf(number, k, q)
    log_ratio = epsilon if direction == "remove" else -epsilon

    def miss(c):
        exponent = log_chance + (number * c - number**2 / 2) / sigma**2
        return float(np.asarray(special.logsumexp(exponent))) - log_ratio

    low, high = -60 * sigma, k + 60 * sigma
    if miss(low) >= 0:  # no output is as much in favour of absence
        return 0.0
    c = float(np.asarray(optimize.brentq(miss, low, high, xtol=1e-13)))
    z = (number - c) / sigma
    if direction == "remove":
        above = np.dot(np.exp(log_chance), special.ndtr(z))
        return above - math.exp(epsilon) * special.ndtr(-c / sigma)
    below = np.dot(np.exp(log_chance), special.ndtr(-z))
    return special.ndtr(c / sigma) - math.exp(epsilon) * below


CASES = [
    (2, 0.1, 1.0, 0.5),
    (3, 0.01, 0.6, 1.0),
    (10, 0.05, 1.5, 0.8),
    (10, 0.5, 5.0, 1.0),
    (50, 0.3, 12.0, 1.5),
    (40, 0.001, 0.8, 0.2),
    (1000, 0.001, 3.0, 1.0),
    (1000, 0.15, 60.0, 2.0),  # more atoms than are kept, and hardly ever no record
    (10_000, 0.0002, 4.0, 1.0),
]


@pytest.mark.parametrize(("k", "q", "sigma", "epsilon"), CASES)
def test_bounds_of_one_step_enclose_the_exact_delta(k, q, sigma, epsilon):
    exact = {d: exact_delta(d, epsilon, k, q, sigma) for d in ("remove", "add")}
    bounds = PldEngine().delta(release(k, q=q, sigma=sigma), epsilon)
    worst = max(exact.values())
    assert bounds.direction == max(exact, key=lambda d: exact[d])
    assert bounds.lower <= worst * (1 + 1e-9) <= bounds.upper * (1 + 2e-9)
    assert bounds.upper <= worst * 1.02
    assert bounds.lower >= worst * 0.98


@pytest.mark.parametrize(("k", "q", "sigma"), [(4, 0.2, 2.0), (30, 0.02, 1.5)])
def test_three_simulated_steps_never_exceed_the_claim_and_come_close(k, q, sigma):
    epsilon, steps, count = 1.0, 3, 400_000
    claimed = PldEngine().delta(release(k, q=q, sigma=sigma, steps=steps), epsilon)
    random = np.random.default_rng(3)
    chance, number = stats.binom.pmf(np.arange(k + 1), k, q), np.arange(k + 1)
    kept = chance > 1e-12
    total = np.zeros((2, count))
    for _ in range(steps):
        drawn = random.binomial(k, q, count)
        for world, shift in enumerate((drawn, 0)):
            x = sigma * random.standard_normal(count) + shift
            exponent = np.multiply.outer(x, number[kept]) - number[kept] ** 2 / 2
            total[world] += np.log(np.exp(exponent / sigma**2) @ chance[kept])
    found, present = total > epsilon, (total[0] > epsilon).mean()
    estimate = present - math.exp(epsilon) * found[1].mean()
    slack = 5 * math.sqrt(present * (1 + math.exp(2 * epsilon)) / count)
    assert claimed.lower - slack <= estimate <= claimed.upper + slack
    assert slack < 0.5 * claimed.upper


@pytest.mark.parametrize(("k", "q"), [(1, 0.3), (7, 0.01), (300, 0.4), (10_000, 0.015)])
def test_law_of_the_number_is_binomial(k, q):
    law = number_law(k, q)
    expected = stats.binom.pmf(np.arange(k + 1), k, q)
    seen = expected > 1e-200
    assert np.allclose(law[seen], expected[seen], rtol=1e-9, atol=0)
    assert law.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("count", [8, 100, 10_000])
@pytest.mark.parametrize(("k", "q", "sigma"), [(1000, 0.15, 60.0), (200, 0.1, 5.0), (9, 0.1, 1.0)])
def test_few_atoms_bound_every_half_line_from_both_sides(k, q, sigma, count):
    one = release(k, q=q, sigma=sigma)
    upper, lower = (number_atoms(one, bound, count, 1e-12) for bound in ("upper", "lower"))
    number = np.arange(1, k + 1)
    chance = stats.binom.pmf(number, k, q) / (1 - (1 - q) ** k)
    gaps = []
    for c in np.linspace(-2 * sigma, k * q + 4 * sigma, 41):
        above, at_most, at_least = (
            np.dot(chance, special.ndtr((number - c) / sigma)),
            upper.beyond + np.dot(upper.weight, special.ndtr((upper.size - c) / sigma)),
            np.dot(lower.weight, special.ndtr((lower.size - c) / sigma)),
        )
        assert at_least * (1 - 1e-11) <= above <= at_most * (1 + 1e-11)
        gaps.append(at_most / at_least - 1)
    if count == 10_000:
        assert max(gaps) < 1e-6


@PROPERTY
@given(
    k=st.integers(2, 60),
    q=st.floats(1e-5, 0.3),
    sigma=st.floats(0.8, 8.0),
    steps=st.integers(1, 500),
)
def test_epsilon_grows_with_the_records_and_stays_below_the_group_bound(k, q, sigma, steps):
    delta = 1e-6
    alone, fewer, more = (
        ONE_SIDED.epsilon(release(count, q=q, sigma=sigma, steps=steps), delta).upper
        for count in (1, k - 1, k)
    )
    assert alone * (1 - 1e-3) <= fewer * (1 + 1e-3)
    assert fewer <= more * (1 + 2e-3)
    if k * alone < 20:
        geometric = sum(math.exp(i * alone) for i in range(k))
        if delta * geometric < 1:
            group = release(k, q=q, sigma=sigma, steps=steps)
            assert ONE_SIDED.epsilon(group, delta * geometric).upper <= k * alone + 1e-9


@PROPERTY
@given(k=st.integers(2, 30), q=st.floats(0.001, 0.2), sigma=st.floats(1.0, 6.0))
def test_epsilon_falls_with_noise_and_grows_with_steps_and_probability(k, q, sigma):
    def epsilon(q, sigma, steps):
        return ONE_SIDED.epsilon(release(k, q=q, sigma=sigma, steps=steps), 1e-6).upper

    base = epsilon(q, sigma, 100) * (1 - 1e-3)
    assert epsilon(q, 1.1 * sigma, 100) * (1 - 2e-3) <= base / (1 - 1e-3)
    assert base <= epsilon(q, sigma, 110)
    assert base <= epsilon(1.1 * q, sigma, 100)


def test_exact_counting_is_far_below_the_group_bound():
    alone = CertifiedEngine().epsilon(release(1, steps=1000, sigma=2.0), 1e-10).upper
    counted = CertifiedEngine().epsilon(release(5, steps=1000, sigma=2.0), 1e-5).upper
    assert counted < 0.8 * 5 * alone


def test_one_record_is_the_plain_mechanism_to_the_last_bit():
    plain = SampledGaussian(noise_multiplier=1.0, sampling_probability=0.01, steps=1000)
    assert release(1, steps=1000) == plain
    assert CertifiedEngine().epsilon(release(1, steps=1000), 1e-5).upper == pytest.approx(
        1.82835, abs=5e-5
    )


def test_two_records_with_tiny_probability_are_about_one_with_twice_of_it():
    two = CertifiedEngine().epsilon(release(2, q=1e-6, steps=10**4), 1e-6)
    one = CertifiedEngine().epsilon(release(1, q=2e-6, steps=10**4), 1e-6)
    assert two.upper == pytest.approx(one.upper, rel=0.01)


@pytest.mark.parametrize("k", [2, 7, 10_000])
def test_closed_forms(k):
    engine = CertifiedEngine()
    whole = engine.epsilon(release(k, q=1.0, sigma=float(k), steps=9), 1e-5)
    same = engine.epsilon(release(1, q=1.0, sigma=1.0, steps=9), 1e-5)
    assert whole.upper == pytest.approx(same.upper, rel=1e-12)
    assert engine.epsilon(release(k, q=0.0, steps=9), 1e-5).upper == 0
    assert engine.epsilon(release(k, steps=0), 1e-5).upper == 0
    assert engine.epsilon(release(k, sigma=0.0), 1e-5).upper == math.inf
    bare = engine.delta(release(k, q=1e-4, sigma=0.0, steps=3), 1.0)
    assert bare.lower == pytest.approx(1 - (1 - 1e-4) ** (3 * k), rel=1e-9)


def test_phases_of_full_and_sampled_batches_add_up():
    plans = [
        PrivacyPlan(
            noise_multiplier=20.0,
            records_per_unit=5,
            **{**SETTINGS, "sampling_probability": 1.0, "steps": 3},
        ),
        replace(PLAN, unit="record"),
    ]
    both = Phases(plans=plans).epsilon()
    assert plans[1].epsilon().upper < both.lower
    assert both.upper < plans[0].epsilon().upper + plans[1].epsilon().upper


def test_bound_holds_where_a_unit_is_in_nearly_every_sample():
    m = release(10_000, q=0.1, sigma=3000.0, steps=10)
    bounds = CertifiedEngine().epsilon(m, 1e-6)
    mean, most = (
        CertifiedEngine().epsilon(release(1, q=1.0, sigma=3000 / size, steps=10), 1e-6)
        for size in (1000, 1300)
    )
    assert mean.lower < bounds.upper < most.lower
    assert bounds.lower == 0
    at = CertifiedEngine().delta(m, bounds.upper)
    assert 1e-7 < at.upper < 3e-6


@pytest.mark.parametrize(("k", "q", "sigma", "epsilon"), CASES)
def test_bounds_by_the_likely_number_hold(k, q, sigma, epsilon):
    exact = max(exact_delta(d, epsilon, k, q, sigma) for d in ("remove", "add"))
    mechanism = release(k, q=q, sigma=sigma)
    assert exact <= likely_delta(mechanism, epsilon)
    assert likely_epsilon(mechanism, exact) >= epsilon
    assert likely_epsilon(release(1, q=q, sigma=sigma), exact) == math.inf


@pytest.mark.parametrize(("k", "q", "sigma", "steps"), [(3, 0.02, 1.0, 100), (20, 0.01, 3.0, 50)])
def test_bounds_meet_those_of_the_installed_dp_accounting(k, q, sigma, steps):
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    chance = stats.binom.pmf(np.arange(k + 1), k, q)
    kept = chance > 1e-18
    chance[0] += chance[~kept].sum()
    optimistic, pessimistic = (
        pld.from_mixture_gaussian_mechanism(
            sigma,
            [float(number) for number in np.arange(k + 1)[kept]],
            [float(value) for value in chance[kept]],
            pessimistic_estimate=flag,
            value_discretization_interval=1e-3,
            use_connect_dots=flag,
        )
        .self_compose(steps)
        .get_epsilon_for_delta(1e-5)
        for flag in (False, True)
    )
    ours = CertifiedEngine().epsilon(release(k, q=q, sigma=sigma, steps=steps), 1e-5)
    assert ours.upper >= optimistic * (1 - 1e-6)
    assert ours.lower <= pessimistic * (1 + 1e-6)


@pytest.mark.parametrize("steps", [1, 10, 100_000])
@pytest.mark.parametrize(
    ("k", "q", "sigma"),
    [(200, 0.5, 0.25), (221, 0.56, 0.25), (80, 0.9, 0.5), (300, 0.3, 0.1), (30, 0.3, 0.01)],
)
def test_losses_of_many_records_beyond_doubles_have_a_looser_bound(k, q, sigma, steps):
    mechanism = SampledGaussian(
        noise_multiplier=sigma, sampling_probability=q, steps=steps, records_per_unit=k
    )
    bounds = CertifiedEngine().epsilon(mechanism, 1e-5)
    # Hardly ever fewer than the first are drawn; never more than all.
    fewest, most = max(float(stats.binom.ppf(1e-9, k, q)), 1.0), k
    fewest, most = (gaussian_epsilon(n / sigma * steps**0.5, 1e-5) for n in (fewest, most))
    assert 0.99 * fewest <= bounds.upper <= most * (1 + 1e-9)
    assert CertifiedEngine().delta(mechanism, 1.0).upper > 0.99


@pytest.mark.parametrize("engine", [RdpEngine(), PrvEngine()])
def test_engines_that_know_one_record_only_refuse_several(engine):
    with pytest.raises(EngineError, match="one record"):
        engine.epsilon(release(2, steps=10), 1e-5)
    if isinstance(engine, RdpEngine):
        with pytest.raises(EngineError, match="one record"):
            engine.delta(release(2, steps=10), 1.0)
