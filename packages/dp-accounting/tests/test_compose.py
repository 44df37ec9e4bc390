"""Compositions bound what plain convolution gives, on whatever grids and in whatever terms."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from veilspan.accounting.engines import CertifiedEngine, SampledGaussian, compose, condensed
from veilspan.accounting.engines.compose import Composition, WindowTooWideError
from veilspan.accounting.engines.discretise import dominated, dominating
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.engines.split import Split

bounds = pytest.mark.parametrize("bound", ["upper", "lower"])


def one_step(bound, q, sigma, fineness, tail=1e-14):
    step = OneStep(SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=1))
    build = dominating if bound == "upper" else dominated
    return build(step, "remove", fineness * step.loss_scale(), step.largest_excess(tail))


def convolved(parts):
    """The law of the sum, point by point, by plain convolution: loss, mass, mass at infinity."""
    origin, law, log_finite = 0.0, np.ones(1), 0.0
    for grid, steps in parts:
        index = grid.index - grid.index[0]
        for _ in range(steps):
            longer = np.zeros(len(law) + int(index[-1]))
            for place, mass in zip(index, grid.mass, strict=True):
                longer[place : place + len(law)] += mass * law
            law = longer
        origin += steps * (grid.origin + grid.spacing * int(grid.index[0]))
        log_finite += steps * math.log1p(-grid.infinite)
    loss = origin + parts[0][0].spacing * np.arange(len(law))
    return loss, law, -math.expm1(log_finite)  # 1 - finite would lose its digits to rounding


def hockey_stick(law, epsilon):
    loss, mass, infinite = law
    return float(np.dot(mass, -np.expm1(np.minimum(epsilon - loss, 0.0)))) + infinite


def exact_epsilon(law, delta):
    low, high = 0.0, float(law[0][-1])
    root: Any = brentq(lambda e: hockey_stick(law, e) - delta, low, high, xtol=1e-12)
    return float(root)


def holds(bound, law, epsilon, delta):
    exact = hockey_stick(law, epsilon)
    return exact <= delta * (1 + 1e-7) if bound == "upper" else exact >= delta * (1 - 1e-7)


@settings(max_examples=60, deadline=None)
@given(
    q=st.floats(-4.0, -0.7).map(lambda e: 10.0**e),
    sigma=st.floats(0.35, 2.0),
    steps=st.integers(1, 9),
    share=st.floats(-6.0, -1.0).map(lambda e: 10.0**e),
    room=st.sampled_from([1 << 9, 1 << 11, 1 << 13]),
    guessed=st.sampled_from([None, 0.3, 1.0, 3.0]),
)
@example(q=1e-4, sigma=0.9921875, steps=1, share=1e-6, room=1 << 13, guessed=None)
@bounds
def test_any_split_and_any_grid_bounds_the_convolution(
    bound, q, sigma, steps, share, room, guessed
):
    """Small rooms and limits have sums split, condensed and grouped that would fit as they are."""
    grid = one_step(bound, q, sigma, 0.2)
    assume(grid.index[-1] < 20_000)
    law = convolved([(grid, steps)])
    delta = max(share * hockey_stick(law, 0.0), 1e-11)
    exact = exact_epsilon(law, delta)
    guess = None if guessed is None else guessed * exact
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_SMALL", 64)
        patch.setattr(compose, "_LEAST_CONDENSED", 128)
        try:
            composed = Composition(
                [(grid, steps)], delta, bound, largest_transform=room, guess=guess
            )
        except WindowTooWideError:
            return
        epsilon = composed.epsilon()
        at_guess = composed.delta(exact)
    assert holds(bound, law, epsilon, delta) or (bound == "lower" and epsilon <= 0)
    true = hockey_stick(law, exact)
    assert at_guess >= true * (1 - 1e-7) if bound == "upper" else at_guess <= true * (1 + 1e-7)


@bounds
@pytest.mark.parametrize(
    ("release", "fineness", "room", "kind"),
    [
        ((1e-4, 0.4, 5), 0.2, 1 << 13, "rare losses one by one"),
        ((0.3, 2.0, 400), 0.1, 1 << 11, "groups"),
    ],
)
def test_each_way_is_taken_and_sharp(monkeypatch, bound, release, fineness, room, kind):
    (q, sigma, steps), condensed_room = release, 1 << 11
    monkeypatch.setattr(compose, "_SMALL", 64)
    monkeypatch.setattr(compose, "_LEAST_CONDENSED", condensed_room)
    grid = one_step(bound, q, sigma, fineness)
    law = convolved([(grid, steps)])
    delta = 1e-4 * hockey_stick(law, 0.0)
    exact = exact_epsilon(law, delta)
    composed = Composition(
        [(grid, steps)], delta, bound, largest_transform=room, guess=0.95 * exact
    )
    terms = composed._terms
    if kind == "groups":
        assert len(terms) == 1
        assert terms[0].moves > 1
        assert terms[0].alone == 0
    else:
        assert len(terms) > 1
        assert any(term.alone > 0 for term in terms)
    found = composed.epsilon()
    assert holds(bound, law, found, delta)
    assert found == pytest.approx(exact, rel=4e-3)


@bounds
def test_two_kinds_of_releases_are_split_together(monkeypatch, bound):
    monkeypatch.setattr(compose, "_SMALL", 64)
    monkeypatch.setattr(compose, "_LEAST_CONDENSED", 512)
    first = OneStep(SampledGaussian(noise_multiplier=0.5, sampling_probability=1e-3, steps=1))
    second = OneStep(SampledGaussian(noise_multiplier=0.6, sampling_probability=2e-3, steps=1))
    build, spacing = (dominating if bound == "upper" else dominated), 0.1 * first.loss_scale()
    parts = [
        (build(step, "remove", spacing, step.largest_excess(1e-14)), steps)
        for step, steps in ((first, 3), (second, 2))
    ]
    law = convolved(parts)
    delta = 1e-4 * hockey_stick(law, 0.0)
    composed = Composition(parts, delta, bound, largest_transform=1 << 11)
    assert len(composed._terms) > 1
    assert holds(bound, law, composed.epsilon(), delta)


@bounds
def test_a_guess_of_nothing_is_no_obstacle(bound):
    grid = one_step(bound, 0.05, 1.0, 0.1)
    law = convolved([(grid, 3)])
    delta = 0.3 * hockey_stick(law, 0.0)
    composed = Composition([(grid, 3)], delta, bound, largest_transform=1 << 14, guess=0.0)
    found = composed.epsilon()
    assert holds(bound, law, found, delta)
    assert found == pytest.approx(exact_epsilon(law, delta), rel=1e-3)


def test_steps_with_more_rare_losses_than_terms_are_charged():
    grid = one_step("upper", 1e-3, 0.45, 0.05)
    part = compose._finite(grid, 50)
    split = Split([part], 1e-6)
    cut = min(term.bulk[0].index[-1] for term in split.terms if term.bulk)
    rare = float(grid.mass[grid.index > cut].sum())
    most = max(term.rare[0].steps for term in split.terms if term.rare)
    beyond = sum(
        math.comb(50, k) * rare**k * (1 - rare) ** (50 - k) for k in range(most + 1, most + 6)
    )
    assert 0 < beyond <= split.beyond <= 1e-7 * 1e-6


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([1, 2, 7, 300, 6000]),
    width=st.floats(0.1, 20.0),
    spacing=st.floats(0.01, 3.0),
    strength=st.floats(0.01, 2.0),
)
@bounds
def test_atoms_that_are_moved_keep_their_bound(bound, seed, count, width, spacing, strength):
    generator, theta = np.random.default_rng(seed), strength / width
    loss = np.sort(generator.normal(0.0, width, count))
    mass = generator.exponential(size=count) ** 3
    mass /= mass.sum()
    exponent = np.log(mass) + theta * loss
    log_moment = float(np.logaddexp.reduce(exponent))
    atoms = condensed._Atoms(loss, np.exp(exponent - log_moment), theta, log_moment)
    part = condensed._moved(atoms, (spacing, bound), 1)
    moved = part.loss, np.exp(part.log_mass), 0.0
    sign = 1 if bound == "upper" else -1
    for epsilon in np.linspace(loss[0] - spacing, loss[-1] + spacing, 23):
        before = hockey_stick((loss, mass, 0.0), epsilon)
        assert sign * (hockey_stick(moved, epsilon) - before) >= -1e-9
    if bound == "upper":  # both masses are kept
        assert np.exp(part.log_mass).sum() == pytest.approx(1.0, rel=1e-9)
        without = float(np.dot(mass, np.exp(-loss)))
        assert np.exp(part.log_mass - part.loss).sum() == pytest.approx(without, rel=1e-9)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (1e-6, 0.8, 10, 1e-12),
        (1e-6, 0.6, 10, 1e-12),
        (1e-6, 0.8, 10_000, 1e-12),
        (1e-7, 0.6, 100_000, 1e-12),
        (1e-6, 0.6, 100_000, 1e-10),
        (1e-6, 0.8, 1_000_000, 1e-8),
        (1e-5, 0.8, 1_000_000, 1e-10),
    ],
)
def test_rare_and_large_losses_leave_bounds_close(q, sigma, steps, delta):
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    answer = CertifiedEngine().epsilon(mechanism, delta)
    assert 0 < answer.lower <= answer.upper <= answer.lower * 1.001
