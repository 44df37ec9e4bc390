"""Replacing a record: the pair that dominates all others, its grid, and what follows from it."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr

from veilspan.accounting import Phases, PrivacyPlan
from veilspan.accounting.__main__ import main
from veilspan.accounting.calibration import calibrate_noise
from veilspan.accounting.engines import (
    CertifiedEngine,
    Composed,
    EngineError,
    PldEngine,
    RdpEngine,
    SampledGaussian,
)
from veilspan.accounting.engines.closed_form import gaussian_epsilon
from veilspan.accounting.engines.prv import PrvEngine
from veilspan.accounting.engines.question import Question
from veilspan.accounting.engines.symmetric import SymmetricStep

probabilities = st.floats(-4.0, -0.02).map(lambda e: 10.0**e)
noises = st.floats(math.log(0.4), math.log(20.0)).map(math.exp)


def replacing(q, sigma, steps=1):
    return SampledGaussian(
        noise_multiplier=sigma, sampling_probability=q, steps=steps, relation="replace"
    )


def loss(x, q, sigma):
    up, down = (x - 0.5) / sigma**2, (-x - 0.5) / sigma**2
    rest = math.log1p(-q) if q < 1 else -math.inf
    return float(np.logaddexp(rest, math.log(q) + up) - np.logaddexp(rest, math.log(q) + down))


def one_step_delta(epsilon, q, sigma):
    """Find where the loss passes ε by bisection, independently of the grid's formula."""
    limit = 60 * sigma + 60 * sigma**2 * (1 + abs(epsilon) - math.log(q))
    x: Any = brentq(lambda x: loss(x, q, sigma) - epsilon, -limit, limit, xtol=1e-14)
    rest, up, down = (ndtr((mean - x) / sigma) for mean in (0.0, 1.0, -1.0))
    return q * up - math.exp(epsilon) * q * down - (1 - q) * math.expm1(epsilon) * rest


def hockey_stick(grid, epsilon):
    gain = -np.expm1(np.minimum(epsilon - grid.loss, 0.0))
    return float(np.dot(grid.mass, gain)) + grid.infinite


@settings(max_examples=60, deadline=None)
@given(q=probabilities, sigma=noises, fineness=st.sampled_from([0.02, 0.05, 0.2, 1.0]))
def test_discretised_step_dominates_or_is_dominated_at_every_epsilon(q, sigma, fineness):
    step = SymmetricStep(q, sigma)
    spacing = fineness * step.loss_scale()
    above, below = step.dominating(spacing, 1e-13), step.dominated(spacing, 1e-13)
    for scale in (-3.0, -1.0, -0.3, 0.0, 0.1, 0.37, 1.0, 2.2, 5.0):
        epsilon = scale * step.loss_scale()
        exact = one_step_delta(epsilon, q, sigma)
        assert hockey_stick(below, epsilon) <= exact + 1e-12
        assert exact <= hockey_stick(above, epsilon) + 1e-12


@pytest.mark.parametrize("tail", [1e-2, 1e-3])
def test_what_lies_beyond_the_grid_is_counted(tail):
    step = SymmetricStep(0.3, 1.0)
    above, below = step.dominating(0.1, tail), step.dominated(0.1, tail)
    assert above.mass.sum() + above.infinite == pytest.approx(1.0, abs=1e-14)
    assert 0.1 * tail < above.infinite <= tail
    assert below.infinite == 0
    assert 1 - tail < below.mass.sum() < 1  # losses of -∞ are left out
    largest = float(above.loss[-1])
    assert hockey_stick(above, largest + 1) >= one_step_delta(largest + 1, 0.3, 1.0)


def black_scholes(a, b, covariance, q, growth):
    """Mean of (q A - growth q B - c)⁺ for log-normal A, B of mean 1, integrated over B."""
    strike = (growth - 1) * (1 - q)

    def given_b(z):
        tilt = covariance / b**2 * (b * z) if b else 0.0  # mean of log A's normal given B's
        rest = math.sqrt(max(a**2 - covariance**2 / b**2 if b else a**2, 1e-18))
        forward = q * math.exp(tilt - (a**2 - rest**2) / 2)
        cost = strike + growth * q * math.exp(b * z - b**2 / 2)
        if cost <= 0:
            return (forward - cost) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        d = (math.log(forward / cost) + rest**2 / 2) / rest
        value = forward * ndtr(d) - cost * ndtr(d - rest)
        return value * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return quad(given_b, -12, 12, limit=400, epsabs=1e-13, epsrel=1e-10)[0]


@pytest.mark.parametrize(
    ("q", "sigma", "epsilon"), [(0.1, 1.0, 0.2), (0.5, 0.8, 0.5), (0.05, 0.6, 1.0), (0.9, 3.0, 0.0)]
)
def test_lemma_opposite_contributions_of_full_norm_are_the_worst(q, sigma, epsilon):
    """Norms of u and v and the cosine between them: δ grows along each towards (1, 1, -1)."""
    growth = math.exp(epsilon)
    worst = one_step_delta(epsilon, q, sigma)
    norms, cosines = (0.3, 0.7, 1.0), (-0.999999, -0.5, 0.0, 0.8)
    values = {}
    for u, v, cosine in itertools.product(norms, norms, cosines):
        a, b = u / sigma, v / sigma
        values[u, v, cosine] = black_scholes(a, b, cosine * a * b, q, growth)
    assert max(values.values()) <= worst * (1 + 1e-6)
    assert values[1.0, 1.0, -0.999999] == pytest.approx(worst, rel=1e-3)
    for u, v in itertools.product(norms, norms):
        falling = [values[u, v, cosine] for cosine in cosines]
        assert all(x >= y - 1e-10 for x, y in itertools.pairwise(falling))
    for fixed in norms:
        for grown in (
            [values[u, fixed, -0.999999] for u in norms],
            [values[fixed, v, -0.999999] for v in norms],
        ):
            assert all(x <= y + 1e-10 for x, y in itertools.pairwise(grown))


@pytest.mark.parametrize(
    ("first", "second"), [((0.3, 0.8), (0.05, 1.0)), ((0.02, 0.6), (0.9, 3.0))]
)
def test_two_releases_equal_the_integral_over_the_first(first, second):
    q, sigma = first
    question = Question((replacing(*first), replacing(*second)), 1e-4, 1 << 20)

    def exact(epsilon):
        total = 0.0
        for weight, mean in ((1 - q, 0.0), (q, 1.0)):

            def integrand(x, mean=mean):
                density = math.exp(-(((x - mean) / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)
                return density / sigma * one_step_delta(epsilon - loss(x, q, sigma), *second)

            ends = mean - 9 * sigma, mean + 9 * sigma
            total += weight * quad(integrand, *ends, limit=400, epsabs=1e-13, epsrel=1e-10)[0]
        return total

    for epsilon in (0.05, 0.5):
        upper = question.delta_at(epsilon, "remove", "upper", 0.003)
        lower = question.delta_at(epsilon, "remove", "lower", 0.003)
        assert lower <= exact(epsilon) * (1 + 1e-8)
        assert exact(epsilon) <= upper * (1 + 1e-8)
        assert upper <= lower * 1.02


@settings(max_examples=10, deadline=None)
@given(
    q=st.floats(-3.0, -0.1).map(lambda e: 10.0**e),
    sigma=st.floats(math.log(0.5), math.log(10.0)).map(math.exp),
    steps=st.integers(1, 2000),
    exponent=st.floats(-12.0, -3.0),
)
def test_replacing_costs_at_least_one_and_at_most_two_changes(q, sigma, steps, exponent):
    delta = 10.0**exponent
    engine = CertifiedEngine()
    one = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    bounds = engine.epsilon(replacing(q, sigma, steps), delta)
    assert bounds.direction == "both"
    assert bounds.upper >= engine.epsilon(one, delta).lower
    # A group of two: (ε, δ) for one change is (2ε, (1 + e^ε) δ) for two.
    half = engine.epsilon(one, delta / 2).upper
    for single in (half, 1.2 * half):
        enough = (1 + math.exp(min(single, 700))) * engine.delta(one, single).upper
        if enough < 0.9:
            assert engine.epsilon(replacing(q, sigma, steps), enough).lower <= 2 * single
    assert engine.delta(replacing(q, sigma, steps), bounds.upper).lower <= delta * (1 + 1e-6)
    assert engine.epsilon(replacing(q, sigma * 1.5, steps), delta).lower <= bounds.upper


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("sigma", [0.7, 5.0, 100.0])
def test_full_sampling_has_twice_the_sensitivity(sigma, delta):
    exact = gaussian_epsilon(2 * math.sqrt(30) / sigma, delta)
    bounds = CertifiedEngine().epsilon(replacing(1.0, sigma, 30), delta)
    assert bounds.method == "analytic Gaussian"
    assert bounds.lower <= exact <= bounds.upper
    nearly = PldEngine().epsilon(replacing(1 - 1e-9, sigma, 30), delta)
    assert nearly.lower <= exact <= nearly.upper * (1 + 1e-6)
    assert nearly.upper <= exact * 1.001


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.01, 1.0, 1000, 1e-5),
        (0.1, 4.0, 1000, 1e-8),
        (1e-4, 0.7, 1_000_000, 1e-9),
        (1e-5, 0.6, 1000, 1e-5),
        (0.001, 50.0, 10, 1e-8),
        (0.01, 1.0, 1000, 1e-14),
    ],
)
def test_bounds_are_tight(q, sigma, steps, delta):
    bounds = CertifiedEngine().epsilon(replacing(q, sigma, steps), delta)
    assert bounds.lower <= bounds.upper <= bounds.lower * 1.001
    if delta == 1e-5 and q == 0.01:
        assert 2.842 < bounds.upper < 2.845


def test_beyond_the_range_of_doubles_the_bound_without_sampling_is_left():
    bounds = CertifiedEngine().epsilon(replacing(0.01, 0.03, 10), 1e-6)
    assert bounds.method == "Gaussian without sampling"
    assert bounds.lower == 0
    assert bounds.upper == pytest.approx(gaussian_epsilon(2 * math.sqrt(10) / 0.03, 1e-6))
    assert CertifiedEngine().delta(replacing(0.01, 0.03, 10), 10.0).upper == pytest.approx(1.0)


def test_engines_without_a_proof_for_replacing_refuse_it():
    for engine in (RdpEngine(), PrvEngine()):
        with pytest.raises(EngineError, match="add/remove"):
            engine.epsilon(replacing(0.1, 1.0), 1e-5)
    with pytest.raises(ValueError, match="relation is 'swap'; supported is 'add_remove' or"):
        SampledGaussian(noise_multiplier=1.0, sampling_probability=0.1, steps=1, relation="swap")
    with pytest.raises(ValueError, match="relation differs"):
        Composed(
            parts=(
                replacing(0.1, 1.0),
                replacing(0.1, 1.0).__class__(
                    noise_multiplier=1.0, sampling_probability=0.1, steps=1
                ),
            )
        )


def test_plan_calibrates_states_and_sums_up_for_its_relation():
    plan = PrivacyPlan.calibrate(
        target_epsilon=3.0,
        delta=1e-6,
        sampling_probability=0.01,
        steps=1000,
        relation="replace",
        unit="document",
    )
    assert 2.99 < plan.epsilon().upper <= 3.0
    bracket = calibrate_noise(
        target_epsilon=3.0, delta=1e-6, sampling_probability=0.01, steps=1000, relation="replace"
    )
    assert bracket.noise_multiplier == plan.noise_multiplier
    text = plan.statement()
    assert "replacing one document by another" in text
    assert "which of two given documents" in text
    assert "relation is replace" in text
    assert "adding or removing" not in text
    assert PrivacyPlan.from_json(plan.to_json()) == plan
    phases = Phases(plans=[plan, plan])
    assert phases.epsilon() == plan.epsilon_after(2000)
    assert "replacing one document by another" in phases.statement()
    other = PrivacyPlan(
        noise_multiplier=1.0,
        sampling_probability=0.01,
        steps=10,
        delta=1e-6,
        unit="document",
    )
    with pytest.raises(ValueError, match="relation differs"):
        Phases(plans=[plan, other])


def test_commands_take_the_relation(capsys):
    rest = ["--sampling-probability", "0.01", "--steps", "1000", "--delta", "1e-5", "--json"]
    noise = ["--noise-multiplier", "1"]
    answers = {}
    for command, options in (
        ("epsilon", noise),
        ("delta", [*noise, "--epsilon", "2"]),
        ("noise", ["--target-epsilon", "2"]),
    ):
        for relation in ("add_remove", "replace"):
            assert main([command, *options, "--relation", relation, *rest]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["relation"] == relation
            key = "noise_multiplier" if command == "noise" else command
            answers[command, relation] = report[key]
    for command in ("epsilon", "delta", "noise"):
        assert answers[command, "replace"] > answers[command, "add_remove"]
