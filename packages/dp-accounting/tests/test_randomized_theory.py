"""The proof in docs/theory/randomized-clipping.md in numbers, but for Section 4.

Section 4, the tail of the estimate, is in test_randomized_spectra.py.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincinv, ndtr

from veilspan.accounting.sketched import SketchedClip

GAMMAS = [0.0, 0.2, 0.7, 1.0, 1.5, 4.0, 30.0, 1e3]


def sampled(norms, chances, q):
    """Return the law of B·S: 0 unless the record is drawn."""
    return np.append(norms, 0.0), np.append(q * np.asarray(chances), 1 - q)


def by_integration(norms, chances, sigma, gamma):
    """Return both hockey sticks of (mixture of N(norm, σ²), N(0, σ²)) from their definition."""
    x = np.linspace(-10 * sigma, norms.max() + 10 * sigma, 40001)
    base = np.exp(-0.5 * (x / sigma) ** 2)
    mixed = chances @ np.exp(-0.5 * ((x - norms[:, None]) / sigma) ** 2)
    unit = (x[1] - x[0]) / (sigma * np.sqrt(2 * np.pi))
    parts = mixed - gamma * base, base - gamma * mixed
    return np.array([np.maximum(part, 0).sum() * unit for part in parts])


def by_half_lines(norms, chances, sigma, gamma):
    """Return the same from Lemma 2, where the likelihood ratio crosses γ and 1/γ."""

    def crossing(level):
        def excess(c):
            exponents = (c * norms - norms**2 / 2) / sigma**2 + np.log(np.maximum(chances, 1e-300))
            return np.logaddexp.reduce(exponents) - np.log(level)

        low, high = -60 * sigma, 60 * sigma + norms.max()
        if excess(low) >= 0:
            return -np.inf
        root: Any = brentq(excess, low, high, xtol=1e-13) if excess(high) > 0 else np.inf
        return root

    up = -np.inf if gamma == 0 else crossing(gamma)
    down = np.inf if gamma == 0 else crossing(1 / gamma)
    remove = chances @ ndtr((norms - up) / sigma) - gamma * ndtr(-up / sigma)
    add = ndtr(down / sigma) - gamma * (chances @ ndtr((down - norms) / sigma))
    return np.array([remove, add])


def envelope_atoms(claim, n=4000):
    """Return norms and chances of S* in thresholds, S rounded up between quantiles of its tail."""
    half = claim.probes / claim.blocks / 2
    tail = np.append(0.0, np.geomspace(1e-16, 1.0, n))
    largest = gammaincinv(half, tail[:-1] ** (1 / claim.blocks)) / half
    with np.errstate(divide="ignore"):
        norms = np.maximum(1.0, largest**-0.5)
    norms[0] = 50.0  # in place of ∞: only the chance of 1e-16 beyond the last quantile
    return norms, np.diff(tail)


discrete = st.integers(0, 10**6).map(np.random.default_rng)


@settings(max_examples=25, deadline=None)
@given(rng=discrete, q=st.sampled_from([1.0, 0.3, 0.01]), sigma=st.sampled_from([0.5, 1.0, 3.0]))
def test_lemma_2_half_lines_are_the_best_events(rng, q, sigma):
    law = sampled(3 * rng.random(5), rng.dirichlet(np.ones(5)), q)
    for gamma in GAMMAS:
        exact = by_integration(*law, sigma, gamma)
        assert by_half_lines(*law, sigma, gamma) == pytest.approx(exact, abs=3e-7)


@settings(max_examples=25, deadline=None)
@given(rng=discrete, q=st.sampled_from([1.0, 0.3, 0.01]))
def test_lemma_3_larger_norms_lose_more_in_both_directions(rng, q):
    norms, chances = 3 * rng.random(6), rng.dirichlet(np.ones(6))
    longer = norms + rng.exponential(0.3, 6) * (rng.random(6) < 0.7)
    strict = []
    for gamma in GAMMAS:
        less = by_integration(*sampled(norms, chances, q), 1.0, gamma)
        more = by_integration(*sampled(longer, chances, q), 1.0, gamma)
        assert (less <= more + 1e-9).all()
        strict.extend(more - less)
    assert max(strict) > 0 or (longer == norms).all()


def test_lemma_3_needs_the_stochastic_order():
    """A law of equal mean that is more spread loses more at some γ: means do not decide."""
    narrow, spread = np.array([1.0, 1.0]), np.array([0.0, 2.0])
    half = np.array([0.5, 0.5])
    found = [
        by_integration(spread, half, 1.0, g) - by_integration(narrow, half, 1.0, g) for g in GAMMAS
    ]
    assert np.max(found) > 1e-3
    assert np.min(found) < -1e-3


def in_the_plane(vectors, chances, gamma, points=501):
    """Return both hockey sticks of (mixture of N(v, I), N(0, I)) in two dimensions."""
    x = np.linspace(-8.0, 8.0 + np.abs(vectors).max(), points)
    bell = np.exp(-0.5 * x**2)
    base = np.outer(bell, bell)
    mixed = sum(
        p * np.outer(*(np.exp(-0.5 * (x - part) ** 2) for part in v))
        for v, p in zip(vectors, chances, strict=True)
    )
    unit = (x[1] - x[0]) ** 2 / (2 * np.pi)
    parts = mixed - gamma * base, base - gamma * mixed
    return np.array([np.maximum(part, 0).sum() * unit for part in parts])


@settings(max_examples=15, deadline=None)
@given(rng=discrete, q=st.sampled_from([1.0, 0.2]))
def test_lemma_1_random_directions_lose_no_more_than_their_norms(rng, q):
    vectors, chances = rng.standard_normal((5, 2)), q * rng.dirichlet(np.ones(5))
    vectors, chances = np.vstack([vectors, [0.0, 0.0]]), np.append(chances, 1 - q)
    norms = np.hypot(*vectors.T)
    for gamma in GAMMAS[:-1]:
        plane = in_the_plane(vectors, chances, gamma)
        assert (plane <= by_half_lines(norms, chances, 1.0, gamma) + 1e-5).all()


def test_lemma_1_is_exact_along_one_direction():
    norms, chances = np.array([0.5, 1.7, 0.0]), np.array([0.2, 0.1, 0.7])
    vectors = np.outer(norms, [0.6, 0.8])
    for gamma in (0.7, 1.0, 1.5):
        plane = in_the_plane(vectors, chances, gamma)
        assert plane == pytest.approx(by_half_lines(norms, chances, 1.0, gamma), abs=1e-5)


@pytest.mark.parametrize("probes", [4, 16])
def test_theorem_16_two_groups_are_bounded_by_the_norm_of_both(probes):
    """Groups with independent estimates: S² = C₁² S₁² + C₂² S₂², a scalar, for the plane."""
    norms, chances = envelope_atoms(SketchedClip(probes=probes), n=9)
    norms = np.minimum(norms, 6.0)
    pairs = np.array(list(itertools.product(norms, norms))) * [0.6, 0.8]
    both = np.array([a * b for a, b in itertools.product(chances, chances)])
    vectors, both = np.vstack([pairs, [0.0, 0.0]]), np.append(0.3 * both, 0.7)
    tight = 0.0
    for gamma in (0.5, 1.0, 1.5, 3.0):
        plane = in_the_plane(vectors, both, gamma, points=301)
        scalar = by_half_lines(np.hypot(*vectors.T), both, 1.0, gamma)
        assert (plane <= scalar + 1e-5).all()
        shorter = by_half_lines(0.95 * np.hypot(*vectors.T), both, 1.0, gamma)
        tight = max(tight, *(plane - shorter))
    assert tight > 1e-4


def contributions(matrix, claim, rule, n, rng):
    """Return norms of n contributions of one gradient, C = 1, as a clipper would make them."""
    norm, k, b = np.linalg.norm(matrix), claim.probes, claim.blocks
    probes = rng.standard_normal((n, b, k // b, matrix.shape[1]))
    means = np.square(probes @ matrix.T).sum(axis=-1).mean(axis=-1)
    return norm * rule(np.sqrt(means.max(axis=1)))


RULES = {
    "clip": lambda n: np.minimum(1.0, 1 / n),
    "auto-s": lambda n: 1 / (n + 0.01),
    "normalise": lambda n: 1 / n,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("claim", [SketchedClip(probes=4), SketchedClip(probes=16, blocks=4)])
@pytest.mark.parametrize("spectrum", [[1.0], [1.0, 0.1], [1.0] * 6, [1.0, 0.01, 0.01]])
def test_theorems_10_and_11_hold_for_drawn_contributions(spectrum, claim, rule):
    """The measured law of S, and the loss of one step, within what 4000 draws can tell."""
    rng, n, q, sigma = np.random.default_rng(7), 4000, 0.2, 1.0
    margin = np.sqrt(np.log(1e6) / (2 * n))  # Massart (1990): exceeded once in 10⁶ times
    norms, chances = envelope_atoms(claim, n=500)
    for length in (0.8, 1.5, 1e6):
        measured = contributions(np.diag(spectrum) * length, claim, RULES[rule], n, rng)
        for s in (1.0, 1.1, 1.3, 2.0):
            assert (measured > s * (1 + 1e-12)).mean() <= claim.exceeds(s) + margin
        for gamma in (0.5, 1.0, 2.0):
            real = by_half_lines(*sampled(measured, np.full(n, 1 / n), q), sigma, gamma)
            bound = by_half_lines(*sampled(norms, chances, q), sigma, gamma)
            assert (real <= bound + q * margin * np.array([1, gamma])).all()


def revealed(norms, chances, q, sigma, gamma):
    """Return E h(S): the hockey sticks where S is part of the release."""
    each = [by_half_lines(*sampled([s], [1.0], q), sigma, gamma) for s in norms]
    return chances @ np.array(each)


@pytest.mark.parametrize("q", [1.0, 0.1])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_theorem_12_the_loss_grows_with_a_known_norm(q, gamma):
    found = np.array(
        [by_half_lines(*sampled([s], [1.0], q), 1.5, gamma) for s in np.linspace(0, 4, 41)]
    )
    assert (np.diff(found, axis=0) >= -1e-14).all()
    assert (found[-1] > found[0]).any()


def test_theorem_12_a_revealed_norm_loses_more_than_a_hidden_one():
    """One step at q = 0.1, σ = 1.5, eight probes, ε = 1: δ is 3.4e-5 hidden, 2.2e-4 revealed."""
    norms, chances = envelope_atoms(SketchedClip(probes=8))
    hidden = by_half_lines(*sampled(norms, chances, 0.1), 1.5, np.e)
    shared = revealed(norms, chances, 0.1, 1.5, np.e)
    assert hidden[0] == pytest.approx(3.4e-5, rel=0.03)
    assert shared[0] == pytest.approx(2.2e-4, rel=0.03)
    assert hidden[0] == hidden.max()
    long_rank_one = (gammaincinv(4, np.minimum(np.cumsum(chances), 1 - 1e-9)) / 4) ** -0.5
    assert revealed(long_rank_one, chances, 0.1, 1.5, np.e)[0] > 6 * hidden[0]  # Proposition 13
    for gamma in GAMMAS:
        more = revealed(norms[::40], chances[::40], 0.1, 1.5, gamma)
        weight = chances[::40].sum()
        less = by_half_lines(*sampled(norms[::40], chances[::40] / weight, 0.1), 1.5, gamma)
        assert (less <= more / weight + 1e-12).all()


def stick(first, second, gamma):
    return np.maximum(first - gamma * second, 0).sum()


@settings(max_examples=50, deadline=None)
@given(rng=discrete)
def test_lemma_14_dominating_pairs_compose_although_the_second_step_adapts(rng):
    pairs = rng.dirichlet(np.ones(3), size=(2, 2))
    first = pairs[0] @ rng.dirichlet(np.ones(4), size=3)  # dominated, as it is made from the pair
    seconds = [pairs[1] @ rng.dirichlet(np.ones(4), size=3) for _ in range(4)]
    joint = ([first[w][o] * seconds[o][w] for o in range(4)] for w in (0, 1))
    with_it, without = map(np.concatenate, joint)
    best_with, best_without = (np.outer(pairs[0][w], pairs[1][w]).ravel() for w in (0, 1))
    for gamma in GAMMAS:
        assert stick(with_it, without, gamma) <= stick(best_with, best_without, gamma) + 1e-12


@pytest.mark.parametrize("probes", [1, 4, 64])
def test_section_8_a_later_gradient_can_hide_from_old_probes(probes):
    old = np.random.default_rng(3).standard_normal((probes, probes + 1))
    gradient = np.linalg.svd(old)[2][-1]  # orthogonal to all of them
    assert np.square(old @ gradient).mean() < 1e-25
    assert np.linalg.norm(gradient) == pytest.approx(1.0)


def squared(matrix):
    return float(np.square(matrix).sum())


def test_section_1_what_sums_before_it_squares_keeps_the_form():
    """An estimate ‖Lz‖² has mean ‖L‖²: the weights λ are the eigenvalues of LᵀL over it."""
    rng = np.random.default_rng(5)
    one, two = rng.standard_normal((2, 4, 3))
    norm = squared(one) + squared(two)
    shared_by_layers = np.vstack([one, two])
    own_per_layer = np.block([[one, np.zeros((4, 3))], [np.zeros((4, 3)), two]])
    for form in (shared_by_layers, own_per_layer):
        assert np.linalg.eigvalsh(form.T @ form).sum() == pytest.approx(norm)
    tied = one + two
    assert np.linalg.eigvalsh(tied.T @ tied).sum() == pytest.approx(squared(tied))
    assert squared(np.hstack([one, two])) == pytest.approx(norm)  # own probes for each use
    assert abs(norm - squared(tied)) > 0.1


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_section_11_probes_of_each_rank_miss_the_terms_across(ranks):
    """Equal parts G/R: the estimate is ‖G‖²/R, so norms exceed the threshold √R times."""
    part = np.outer([0.6, 0.8], [1.0, 2.0, 2.0]) / ranks
    own = np.hstack([part] * ranks)
    values = np.linalg.eigvalsh(own.T @ own)
    whole = squared(part * ranks)
    assert values.sum() == pytest.approx(whole / ranks)
    weights, k = values[values > 1e-9] / whole, 16
    assert len(weights) == 1  # the columns of all ranks are parallel
    s = 0.95 * ranks**0.5
    exceeds = gammainc(k / 2, k / 2 / (weights[0] * s**2))
    assert exceeds > max(0.4, 1.5 * float(SketchedClip(probes=k).exceeds(s)))


@pytest.mark.parametrize("probes", [1, 2, 4])
def test_section_12_signs_lose_a_gradient_on_two_coordinates(probes):
    signs = np.array(list(itertools.product([-1, 1], repeat=2 * probes))).reshape(-1, probes, 2)
    estimates = np.square(signs @ [2**-0.5, 2**-0.5]).mean(axis=1)
    assert (estimates < 1e-12).mean() == 2.0**-probes
    assert estimates.mean() == pytest.approx(1.0)
    assert (estimates < 1e-12).mean() > SketchedClip(probes=probes).exceeds(1e3)


@pytest.mark.parametrize("probes", [1, 4, 48])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_theorem_17_hutch_pp_with_its_own_sketch(probes, share, power):
    """One sketch vector in the plane: given its angle, all laws are known."""
    angle = (np.arange(20000) + 0.5) * (2 * np.pi / 20000)
    weights = np.array([1 - share, share])[:, None]
    circle = np.array([np.cos(angle), np.sin(angle)])
    sketch = weights**power * circle  # the basis: M^power ω, normalised
    caught = (weights * sketch**2).sum(axis=0) / (sketch**2).sum(axis=0)
    for x in (0.2, 0.5, 0.8, 1.0):
        rest = np.maximum(x - caught, 0) / (1 - caught)
        residual = gammainc(probes / 2, probes / 2 * rest)  # of the residual probes, given ω
        own = -np.expm1(-x / 2 / (weights * circle**2).sum(axis=0))  # of ω: χ²_2 is exponential
        few = float(SketchedClip(probes=probes).exceeds(x**-0.5))
        assert residual.max() <= few * (1 + 1e-9)
        one = float(SketchedClip(probes=1).exceeds(x**-0.5))
        assert own.mean() <= one
        assert (residual * own).mean() <= few * one * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(rng=discrete, error=st.floats(0.0, 0.2))
def test_lemma_18_a_guard_makes_up_for_rounding(rng, error):
    """Products off by at most `error` in the root mean square: the guarded norm is no shorter."""
    true = rng.standard_normal((8, 5))
    off = rng.standard_normal((8, 5))
    off *= error / np.sqrt(np.square(off).sum(axis=1).mean())
    norm, computed = (np.sqrt(np.square(m).sum(axis=1).mean()) for m in (true, true + off))
    assert computed + error >= norm - 1e-12
    assert min(1.0, 1 / (computed + error)) * norm <= 1 + 1e-12
