"""Bounds enclose every value of ε that can be computed without discretising."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.engines import CertifiedEngine, PldEngine, RdpEngine, SampledGaussian
from veilspan.accounting.engines.closed_form import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_log_delta,
    gaussian_upper,
)
from veilspan.accounting.engines.compose import Composition
from veilspan.accounting.engines.discretise import dominated, dominating
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.engines.protocol import EngineError

probabilities = st.floats(-4.0, -0.02).map(lambda e: 10.0**e)
usual_probabilities = st.floats(-2.5, -0.1).map(lambda e: 10.0**e)
noises = st.floats(math.log(0.4), math.log(20.0)).map(math.exp)


def one_step_delta(direction: str, epsilon: float, q: float, sigma: float) -> float:
    """δ(ε) of one release in closed form: the likelihood ratio is monotone."""
    if direction == "remove":
        if epsilon <= math.log1p(-q):
            return -math.expm1(epsilon)
        x = _crossing(epsilon, q, sigma)
        return q * ndtr((1 - x) / sigma) - (math.expm1(epsilon) + q) * ndtr(-x / sigma)
    if epsilon >= -math.log1p(-q):
        return 0.0
    x = _crossing(-epsilon, q, sigma)
    p = (1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma)
    return ndtr(x / sigma) - math.exp(epsilon) * p


def _crossing(loss: float, q: float, sigma: float) -> float:
    growth = math.expm1(loss) + q
    return sigma**2 * math.log(growth / q) + 0.5


def hockey_stick(grid, epsilon: float) -> float:
    gain = -np.expm1(np.minimum(epsilon - grid.loss, 0.0))
    return float(np.dot(grid.mass, gain)) + grid.infinite


@settings(max_examples=60, deadline=None)
@given(q=probabilities, sigma=noises, fineness=st.sampled_from([0.02, 0.05, 0.2, 1.0]))
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_discretised_step_dominates_or_is_dominated_at_every_epsilon(direction, q, sigma, fineness):
    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    spacing, largest = fineness * step.loss_scale(), step.largest_excess(1e-13)
    above = dominating(step, direction, spacing, largest)
    below = dominated(step, direction, spacing, largest)
    for scale in (-3.0, -1.0, -0.3, 0.0, 0.1, 0.37, 1.0, 2.2, 5.0):
        epsilon = scale * step.loss_scale()
        exact = one_step_delta(direction, epsilon, q, sigma)
        assert hockey_stick(below, epsilon) <= exact + 1e-12
        assert exact <= hockey_stick(above, epsilon) + 1e-12


@settings(max_examples=40, deadline=None)
@given(
    q=st.floats(-6.0, -0.02).map(lambda e: 10.0**e),
    sigma=noises,
    fineness=st.sampled_from([5e-3, 0.03, 0.3]),
)
@example(q=1e-3, sigma=0.8, fineness=1e-3)
@example(q=0.9, sigma=2.0, fineness=1e-3)  # so fine a grid takes a second
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_a_dominated_step_is_a_law_that_gives_nothing_away_upwards(direction, q, sigma, fineness):
    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    grid = dominated(step, direction, fineness * step.loss_scale(), step.largest_excess(1e-15))
    assert grid.mass.min() >= 0
    assert grid.mass.sum() == pytest.approx(1.0, abs=2e-14)
    assert float(np.dot(grid.mass, np.exp(-grid.loss))) >= 1 - 2e-13


@settings(max_examples=25, deadline=None)
@given(q=probabilities, sigma=noises, scale=st.floats(0.5, 6.0))
def test_epsilon_of_one_step_inverts_its_delta(q, sigma, scale):
    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    epsilon = scale * step.loss_scale()
    delta = max(one_step_delta(d, epsilon, q, sigma) for d in ("remove", "add"))
    if delta < 1e-13:  # the closed form itself loses its digits
        return
    one = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1)
    slack = 1e-14 / delta * epsilon
    for engine, width in ((PldEngine(), 0.01), (CertifiedEngine(), 1e-8 + 1e-14 / delta)):
        bounds = engine.epsilon(one, delta)
        assert bounds.lower - slack <= epsilon <= bounds.upper + slack
        assert bounds.upper == pytest.approx(epsilon, rel=width)
    bounds = CertifiedEngine().delta(one, epsilon)
    assert bounds.lower - 1e-14 <= delta <= bounds.upper + 1e-14
    assert bounds.upper == pytest.approx(delta, rel=1e-7, abs=1e-13)


@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.2, 0.999])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_closed_form_of_one_release_lies_between_the_bounds_of_the_grid(q, sigma, delta):
    one = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1)
    exact = CertifiedEngine().epsilon(one, delta)
    try:
        bounds = PldEngine().epsilon(one, delta)
    except EngineError:  # losses beyond the range of doubles
        assert sigma == 0.05
        return
    assert bounds.lower * (1 - 1e-9) <= exact.upper
    assert exact.lower <= bounds.upper * (1 + 1e-9)
    assert exact.upper <= exact.lower * (1 + 1e-7) + 1e-20
    back = CertifiedEngine().delta(one, exact.upper)
    assert back.upper == pytest.approx(min(delta, q * math.erf(1 / sigma / 8**0.5)), rel=1e-6)


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(("q", "sigma"), [(0.3, 0.8), (0.05, 1.0), (0.9, 3.0), (0.01, 0.5)])
def test_two_steps_equal_the_integral_over_the_first(direction, q, sigma):
    sign = 1 if direction == "remove" else -1
    weights = ((1 - q, 0.0), (q, 1.0)) if direction == "remove" else ((1.0, 0.0),)

    def loss(x):
        return sign * math.log1p(q * math.expm1((x - 0.5) / sigma**2))

    def delta_after_two(epsilon):
        total = 0.0
        for weight, mean in weights:

            def integrand(x, mean=mean):
                density = (
                    math.exp(-(((x - mean) / sigma) ** 2) / 2) / sigma / math.sqrt(2 * math.pi)
                )
                return density * one_step_delta(direction, epsilon - loss(x), q, sigma)

            ends = mean - 9 * sigma, mean + 9 * sigma
            total += weight * quad(integrand, *ends, limit=400, epsabs=1e-14, epsrel=1e-11)[0]
        return total

    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    epsilon = min(2.0 * step.loss_scale(), -0.7 * math.log1p(-q))  # adding costs at most this
    delta = delta_after_two(epsilon)
    spacing, largest = 0.002 * step.loss_scale(), step.largest_excess(1e-7 * delta)

    def composed(grid, bound):
        return Composition([(grid, 2)], delta, bound, largest_transform=1 << 20).epsilon()

    upper = composed(dominating(step, direction, spacing, largest), "upper")
    lower = composed(dominated(step, direction, spacing, largest), "lower")
    assert lower * (1 - 1e-7) <= epsilon <= upper * (1 + 1e-7)
    assert upper == pytest.approx(epsilon, rel=2e-3)
    assert lower == pytest.approx(epsilon, rel=2e-3)


def test_additivity_k_and_m_steps_convolve_to_k_plus_m():
    q, sigma, delta = 0.2, 1.0, 1e-6
    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    spacing = 0.05 * step.loss_scale()
    grid = dominating(step, "remove", spacing, step.largest_excess(1e-7 * delta / 8))
    mass = np.zeros(grid.index[-1] + 1)
    mass[grid.index] = grid.mass
    two = np.convolve(mass, mass)
    five = np.convolve(np.convolve(two, mass), two)
    loss = 5 * grid.origin + spacing * np.arange(len(five))
    infinite = -math.expm1(5 * math.log1p(-grid.infinite))

    def delta_of(epsilon):
        return float(np.dot(five, -np.expm1(np.minimum(epsilon - loss, 0.0)))) + infinite

    epsilon = Composition([(grid, 5)], delta, "upper", largest_transform=1 << 18).epsilon()
    assert delta_of(epsilon) <= delta
    assert delta_of(epsilon * (1 - 1e-5)) > delta


@settings(max_examples=15, deadline=None)
@given(q=usual_probabilities, sigma=noises, k=st.integers(1, 400), m=st.integers(1, 400))
def test_additivity_joint_composition_is_at_most_the_sum_of_its_parts(q, sigma, k, m):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=q, steps=k + m, delta=2e-6)
    parts = plan.epsilon_after(k, 1e-6).upper + plan.epsilon_after(m, 1e-6).upper
    assert plan.epsilon().lower <= parts


@settings(max_examples=12, deadline=None)
@given(
    q=usual_probabilities,
    sigma=noises,
    steps=st.integers(1, 2000),
    factor=st.floats(1.0, 3.0),
    exponent=st.floats(-12.0, -3.0),
)
def test_epsilon_is_monotone_in_noise_sampling_steps_and_delta(q, sigma, steps, factor, exponent):
    delta = 10.0**exponent

    def bounds(sigma=sigma, q=q, steps=steps, delta=delta):
        mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
        return CertifiedEngine().epsilon(mechanism, delta)

    here = bounds()
    assert bounds(sigma=sigma * factor).lower <= here.upper
    assert bounds(q=q / factor).lower <= here.upper
    assert bounds(steps=max(1, int(steps / factor))).lower <= here.upper
    assert bounds(delta=min(delta * factor, 0.5)).lower <= here.upper


@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("sigma", [0.7, 5.0, 100.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12, 1e-30])
def test_full_sampling_equals_the_analytic_gaussian(steps, sigma, delta):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=1.0, steps=steps, delta=delta)
    bounds = plan.epsilon()
    mu = math.sqrt(steps) / sigma
    assert bounds.method == "analytic Gaussian"
    if bounds.upper == 0:
        assert 2 * ndtr(mu / 2) - 1 <= delta
    else:
        assert (
            gaussian_log_delta(bounds.lower, mu)
            >= math.log(delta)
            >= (gaussian_log_delta(bounds.upper, mu))
        )


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-30])
def test_nearly_full_sampling_meets_the_analytic_gaussian_down_to_tiny_delta(delta):
    mechanism = SampledGaussian(noise_multiplier=4.0, sampling_probability=1 - 1e-9, steps=50)
    bounds = PldEngine().epsilon(mechanism, delta)
    analytic = gaussian_epsilon(math.sqrt(50) / 4.0, delta)
    assert bounds.lower <= analytic <= bounds.upper * (1 + 1e-6)
    assert bounds.upper <= analytic * 1.001


@pytest.mark.parametrize("delta", [1e-305, 1e-300, 1e-30, 1e-6, 0.4])
@pytest.mark.parametrize("sigma", [1e-6, 0.01, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("q", [0.3, 1.0])
def test_closed_forms_end_with_an_interval_that_holds_their_estimate(q, sigma, delta):
    one = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1)
    bounds = CertifiedEngine().epsilon(one, delta)
    assert 0 <= bounds.lower <= bounds.estimate <= bounds.upper < math.inf
    if sigma <= 1e3 and delta >= 1e-300:
        assert bounds.upper <= bounds.lower * (1 + 1e-6) + 1e-15


def test_gaussian_reference_values_hold():
    # Three compositions of σ = √3 are one release with μ = 1: δ(1) = 0.12693674 (dp_accounting).
    assert math.exp(gaussian_log_delta(1.0, 1.0)) == pytest.approx(0.12693674, abs=1e-8)
    # σ = 4.530877117 has a Rényi ε of 1 at δ = 1e-6 and an exact δ(1) of 2.16e-7.
    assert math.exp(gaussian_log_delta(1.0, 1 / 4.530877117)) == pytest.approx(2.16e-7, rel=0.01)


@pytest.mark.parametrize(
    ("mu", "epsilon", "delta"),  # to 500 digits by mpmath
    [
        (1e-06, 2.4e-05, 5.773426555872192e-135),
        (1e-09, 3.0000000000000004e-08, 1.6319567585706511e-208),
        (1e-11, 3.15e-10, 1.3760387549757228e-230),
        (1e-07, 3.6e-06, 1.1600560214715907e-292),
        (1e-06, 5.5e-06, 3.2550158143311013e-15),
        (1e-08, 5e-08, 5.346165667486965e-16),
        (1e-10, 3e-10, 3.821543171050469e-14),
    ],
)
def test_gaussian_of_much_noise_is_enclosed_though_its_terms_nearly_cancel(mu, epsilon, delta):
    assert gaussian_delta(epsilon, mu, -1) < delta < gaussian_delta(epsilon, mu, +1)
    # So it must be near δ = 1e-300, and where sampling at nearly every step leaves this bound.
    assert epsilon <= gaussian_upper(mu, delta) <= epsilon * 1.01
    nearly = SampledGaussian(noise_multiplier=2**0.5 / mu, sampling_probability=1 - 1e-16, steps=2)
    assert epsilon * (1 - 1e-15) <= CertifiedEngine().epsilon(nearly, delta).upper <= epsilon * 1.01


def test_poisson_reference_value_holds():
    # q = 0.2, σ = 0.5, three steps: δ(1) = 0.155933 (dp_accounting).
    plan = PrivacyPlan(noise_multiplier=0.5, sampling_probability=0.2, steps=3, delta=0.155933)
    assert plan.epsilon().upper == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "epsilon"),
    [(0.0, 1.0, 100, 0.0), (0.5, 1.0, 0, 0.0), (0.5, 0.0, 1, math.inf), (1.0, 0.0, 1, math.inf)],
)
def test_nothing_released_costs_nothing_and_no_noise_costs_everything(q, sigma, steps, epsilon):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=q, steps=steps, delta=1e-6)
    bounds = plan.epsilon()
    assert (bounds.lower, bounds.estimate, bounds.upper) == (epsilon,) * 3


def test_infinite_noise_costs_nothing():
    mechanism = SampledGaussian(noise_multiplier=math.inf, sampling_probability=0.1, steps=100)
    assert CertifiedEngine().epsilon(mechanism, 1e-6).upper == 0.0


def test_epsilon_grows_without_limit_as_the_noise_vanishes():
    values = []
    for sigma in (1.0, 0.3, 0.1, 0.03, 0.01, 0.001):
        mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=0.01, steps=100)
        values.append(CertifiedEngine().epsilon(mechanism, 1e-6).upper)
    assert values == sorted(values)
    assert values[-1] > 1e5


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.1, 0.5, 100_000, 1e-6),  # ε in the thousands
        (0.1, 10.0, 1_000_000, 1e-12),
        (0.001, 0.5, 1_000_000, 1e-6),
        (0.4, 0.5, 2_000, 1e-5),
        (0.001, 50.0, 10, 1e-8),  # ε of two in ten thousand
        (0.3, 0.01, 1_000, 1e-5),  # beyond the range of doubles
        (0.01, 1.0, 1_000, 0.3),  # δ above what one record can change
        (1e-9, 0.5, 1_000_000, 1e-6),
        (1.15e-5, 0.3825, 7, 1.16e-10),  # rare losses of 10, usual ones of a thousandth
        (0.9944, 0.041, 7, 2.3e-18),
    ],
)
def test_hard_cases_end_soon_with_a_valid_bound(q, sigma, steps, delta):
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    bounds = CertifiedEngine().epsilon(mechanism, delta)
    assert math.isfinite(bounds.upper)
    assert bounds.upper <= gaussian_epsilon(math.sqrt(steps) / sigma, delta) * (1 + 1e-9)
    loose = RdpEngine().epsilon(mechanism, delta).upper
    assert bounds.lower <= loose
    assert bounds.upper <= loose * (1 + 1e-6) + 1e-4  # where ε is 0, a grid cell is left


def test_numeric_trouble_ends_in_a_looser_bound_that_names_its_engine():
    mechanism = SampledGaussian(noise_multiplier=0.03, sampling_probability=0.01, steps=1000)
    with pytest.raises(RuntimeError, match="beyond a double's range"):
        PldEngine().epsilon(mechanism, 1e-6)
    bounds = CertifiedEngine().epsilon(mechanism, 1e-6)
    assert "Rényi" in bounds.method
    assert bounds.lower == 0.0
    assert bounds.upper > 1000


@pytest.mark.parametrize("q", [5e-324, 1e-300])
def test_hardly_any_sampling_costs_next_to_nothing(q):
    mechanism = SampledGaussian(noise_multiplier=1.0, sampling_probability=q, steps=100)
    assert CertifiedEngine().epsilon(mechanism, 1e-5).upper < 5e-3
