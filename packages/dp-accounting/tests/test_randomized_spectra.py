"""Section 4 of docs/theory/randomized-clipping.md in numbers: the estimate's lower tail.

X = e + Σ λ_i G_i with independent gamma variables G_i of shape a_i and mean 1. Its laws come from
Bromwich's integral along a parabola through the saddle point, to about 12 digits, relatively.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import gammainc
from scipy.stats import gamma

from veilspan.accounting.sketched import SketchedClip

GRID = np.linspace(-8.0, 8.0, 1201)


def bromwich(x, theta, shapes, power):
    """Return ∫ s^power e^{sx} Π (1 + θ s)^{-shape} ds / 2πi.

    Powers of -1, 0 and 1 give the CDF at x, the density and its slope.
    """
    theta, shapes = np.asarray(theta, float), np.broadcast_to(shapes, np.shape(theta))

    def slope(log_c):
        c = np.exp(log_c)
        return x - (shapes * theta / (1 + c * theta)).sum() - 1 / c

    root: Any = brentq(slope, -60.0, 60.0)
    c = np.exp(root)
    curvature = (shapes * (theta / (1 + c * theta)) ** 2).sum() + c**-2
    width = 1.2 / np.sqrt(curvature)
    y, dy = width * np.sinh(GRID), width * np.cosh(GRID) * (GRID[1] - GRID[0])
    bend = 0.1 if shapes[theta > 0.02 * theta.max()].sum() < 12 else 0.0
    s = c + 1j * y - bend * y**2 / c
    log = s * x + power * np.log(s) - (shapes * np.log1p(np.outer(s, theta))).sum(axis=1)
    terms = np.exp(log) * (1j - 2 * bend * y / c) * dy
    return float(terms.sum().imag / (2 * np.pi))


def below(x, weights, shapes, exact=0.0):
    """Return P(X <= x)."""
    if x <= exact:
        return 0.0
    return bromwich(x - exact, np.asarray(weights) / shapes, shapes, -1)


def one_weight(x, probes):
    """Return F_k(x) = P(χ²_k/k <= x), the bound of the theorem, as the package computes it."""
    return float(SketchedClip(probes=probes).exceeds(x**-0.5))


def normalised(weights):
    return np.asarray(weights) / np.sum(weights)


def spectra(rng):
    for n in (2, 3, 6, 20):
        for concentration in (0.05, 0.3, 1.0, 5.0):
            yield from (normalised(rng.dirichlet([concentration] * n) + 1e-12) for _ in range(2))
        yield from (normalised(np.arange(1.0, n + 1) ** -power) for power in (0.5, 1.0, 2.0, 6.0))
        yield np.full(n, 1 / n)
    for rest in (1e-4, 1e-2, 0.1, 0.3, 0.5):
        yield from (np.array([1 - rest, *[rest / n] * n]) for n in (1, 2, 10, 50))


SPECTRA = list(spectra(np.random.default_rng(0)))
weights_strategy = st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=6).map(normalised)
shape = st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, 16.0])


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0, 8.0, 32.0])
@pytest.mark.parametrize("x", [0.05, 0.4, 0.8, 1.0, 1.5])
def test_oracle_agrees_with_the_incomplete_gamma_function(a, x):
    assert below(x, [1.0], a) == pytest.approx(gammainc(a, a * x), rel=1e-11)
    for n in (2, 5, 50):
        exact = gammainc(n * a, n * a * x)
        if exact > 1e-250:
            assert below(x, np.full(n, 1 / n), a) == pytest.approx(exact, rel=1e-10)
    assert bromwich(x, [1.0], 2 + a, 0) == pytest.approx(gamma.pdf(x, 2 + a), rel=1e-10)


def test_oracle_agrees_with_sums_of_exponential_variables():
    theta, x = np.array([0.1, 0.2, 0.7]), 0.9
    factors = [np.prod([t / (t - u) for u in theta if u != t]) for t in theta]
    exact = 1 - np.dot(factors, np.exp(-x / theta))
    assert bromwich(x, theta, 1.0, -1) == pytest.approx(exact, rel=1e-11)
    assert bromwich(x, theta, 1.0, 0) == pytest.approx(
        np.dot(factors, np.exp(-x / theta) / theta), rel=1e-11
    )


@settings(max_examples=25, deadline=None)
@given(theta=st.lists(st.floats(0.02, 1.0), min_size=1, max_size=4), data=st.data())
def test_lemma_4_densities_satisfy_both_identities(theta, data):
    shapes = np.array([data.draw(shape) for _ in theta]) + 2.0 / len(theta)
    theta, y = np.array(theta), data.draw(st.floats(0.2, 2.0)) * np.dot(theta, shapes)
    density = bromwich(y, theta, shapes, 0)
    more = [shapes + np.eye(len(theta))[i] for i in range(len(theta))]
    longer = np.array([bromwich(y, theta, m, 0) for m in more])
    slopes = np.array([bromwich(y, theta, m, 1) for m in more])
    assert np.dot(shapes * theta, longer) == pytest.approx(y * density, rel=1e-8)
    assert longer + theta * slopes == pytest.approx(density, rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(theta=st.lists(st.floats(0.02, 1.0), min_size=1, max_size=4), data=st.data())
def test_lemmas_5_and_6_one_mode_close_below_the_mean(theta, data):
    """Two exponentials are added, as in the transfer; other shapes are 1/2 and more."""
    shapes = np.array([data.draw(shape) for _ in theta] + [1.0, 1.0])
    theta = np.array([*theta, data.draw(st.sampled_from(theta)), data.draw(st.sampled_from(theta))])
    mean, deviation = np.dot(theta, shapes), np.sqrt(np.dot(theta**2, shapes))

    def slope(y):
        return bromwich(y, theta, shapes, 1)

    ends = max(1e-3 * mean, mean - 4 * deviation), mean + 4 * deviation
    signs = np.sign([slope(y) for y in np.linspace(*ends, 41)])
    assert signs[0] == 1
    assert signs[-1] == -1
    assert np.count_nonzero(np.diff(signs)) == 1
    mode: Any = brentq(slope, ends[0], ends[1], xtol=1e-12)
    assert theta.min() - 1e-8 <= mean - mode <= theta.max() + 1e-8


def test_lemma_6_is_exact_for_equal_scales():
    for a in (2.5, 4.0, 9.0):
        mode: Any = brentq(lambda y, a=a: bromwich(y, [0.3], a, 1), 0.05, 0.3 * a)
        assert 0.3 * a - mode == pytest.approx(0.3, rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(weights=weights_strategy, data=st.data(), x=st.floats(0.1, 1.6))
def test_lemma_7_moving_weight_changes_the_tail_at_the_stated_rate(weights, data, x):
    shapes = np.array([data.draw(shape) for _ in weights])
    theta = weights / shapes
    i = int(np.argmax(theta))
    j = data.draw(st.sampled_from([m for m in range(len(weights)) if m != i]))
    move = np.eye(len(weights))[i] - np.eye(len(weights))[j]

    def difference(step):
        ends = [below(x, weights + sign * step * move, shapes) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)

    step = 1e-3 * weights[j]
    measured = (4 * difference(step / 2) - difference(step)) / 3  # free of the error in step²
    two = np.concatenate([theta, theta[[i, j]]])
    slope = bromwich(x, two, np.concatenate([shapes, [1.0, 1.0]]), 1)
    rate = (theta[i] - theta[j]) * slope
    assert measured == pytest.approx(rate, rel=1e-3, abs=1e-6)
    if x <= 1:
        assert slope >= -1e-10


@pytest.mark.parametrize("probes", [1, 2, 4, 8, 16, 64])
def test_theorem_8_no_spectrum_has_a_heavier_tail_than_one_weight(probes):
    for x in (0.2, 0.5, 0.8, 0.95, 1.0):
        bound = one_weight(x, probes)
        if bound > 1e-200:
            assert max(below(x, weights, probes / 2) for weights in SPECTRA) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("probes", [1, 2, 4, 8, 16, 64])
def test_theorem_8_an_adversary_finds_no_worse_spectrum(probes):
    rng = np.random.default_rng(probes)
    for x in (0.6, 1.0):
        bound = one_weight(x, probes)
        if bound < 1e-8:
            continue
        for n in (2, 4):
            found = minimize(
                lambda u, x=x: -below(x, normalised(np.exp(u - u.max()) + 1e-13), probes / 2),
                rng.standard_normal(n),
                method="Nelder-Mead",
                options={"maxiter": 100},
            )
            assert 0.999 * bound < -found.fun <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("probes", "spectrum"), [(1, [0.989, 0.011]), (2, [0.979, 0.021]), (64, [0.02] * 50)]
)
def test_theorem_8_ends_at_the_mean(probes, spectrum):
    """At 1.02 another spectrum is worse; flat ones come near 1, so the floor at C is exact."""
    a = probes / 2
    assert below(1.0, spectrum, a) < gammainc(a, a)
    assert below(1.02, spectrum, a) > gammainc(a, 1.02 * a) * (1 + 1e-5)
    flat = [gammainc(n * a, n * a * 1.02) for n in (10, 1000, 10**6)]
    assert flat == sorted(flat)
    assert flat[-1] > 1 - 1e-12
    assert SketchedClip(probes=probes).exceeds(1.02**-0.5) == 1


@pytest.mark.parametrize("x", [0.1, 0.5, 0.9, 1.0])
def test_corollary_9a_more_probes_have_a_lighter_tail(x):
    bounds = [one_weight(x, probes) for probes in range(1, 200)]
    assert all(later < earlier for earlier, later in itertools.pairwise(bounds))


@settings(max_examples=40, deadline=None)
@given(weights=weights_strategy, data=st.data(), x=st.floats(0.05, 1.0))
def test_corollary_9b_unequal_probes_count_as_the_fewest(weights, data, x):
    probes = np.array([data.draw(st.sampled_from([1, 2, 3, 8, 64])) for _ in weights])
    bound = one_weight(x, int(probes.min()))
    assert below(x, weights, probes / 2) <= bound * (1 + 1e-9) + 1e-300


@settings(max_examples=40, deadline=None)
@given(weights=weights_strategy, exact=st.floats(0.0, 0.999), x=st.floats(0.05, 1.0))
@pytest.mark.parametrize("probes", [1, 4, 16])
def test_corollary_9c_exact_parts_do_not_hurt(probes, weights, exact, x):
    found = below(x, (1 - exact) * weights, probes / 2, exact)
    assert found <= one_weight(x, probes) * (1 + 1e-9)


@pytest.mark.parametrize(("probes", "blocks"), [(64, 4), (16, 8), (8, 8)])
def test_corollary_9d_the_largest_of_blocks(probes, blocks):
    claim = SketchedClip(probes=probes, blocks=blocks)
    for x in (0.3, 0.7, 1.0):
        bound = float(claim.exceeds(x**-0.5))
        tails = [below(x, w, probes / blocks / 2) ** blocks for w in SPECTRA[::3]]
        assert max(tails) <= bound * (1 + 1e-9)
        worst = below(x, [1.0], probes / blocks / 2) ** blocks
        assert worst == pytest.approx(bound, rel=1e-9)
