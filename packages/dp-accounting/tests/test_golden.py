"""ε agrees with certified intervals and with the numbers that other libraries publish."""

import pytest

from veilspan.accounting import PrivacyPlan
from veilspan.accounting.engines import PldEngine, RdpEngine, SampledGaussian, question
from veilspan.accounting.engines.prv import PrvEngine

# q, σ, T, δ, certified lower, certified upper: two-sided interval arithmetic on finer grids,
# printed to four decimals.
CERTIFIED = [
    (0.001, 0.5, 1_000, 1e-5, 3.2381, 3.2389),
    (0.001, 0.8, 10_000, 1e-6, 0.9471, 0.9472),
    (0.001, 2.0, 100_000, 1e-6, 0.6966, 0.6967),
    (0.0025, 0.6, 2_000, 1e-6, 3.9438, 3.9449),
    (0.01, 0.6, 1_000, 1e-6, 8.7092, 8.7116),
    (0.01, 1.0, 1_000, 1e-5, 1.8281, 1.8283),
    (0.01, 2.0, 10_000, 1e-5, 2.1625, 2.1628),
    (0.02, 1.0, 500, 1e-6, 3.2134, 3.2137),
    (0.05, 3.0, 2_000, 1e-7, 4.0437, 4.0441),
    (0.1, 4.0, 1_000, 1e-8, 4.6125, 4.6130),
    (0.25, 5.0, 500, 1e-6, 5.6820, 5.6826),
    (1e-4, 0.7, 1_000_000, 1e-9, 1.6112, 1.6114),
    (0.001, 5.0, 1_000_000, 1e-9, 1.1163, 1.1164),
]
# Where 64-bit Fourier accountants return values below the truth, or several times above it.
TINY_DELTA = [
    (0.01, 1.0, 1_000, 1e-13, 4.2297, 4.2299),
    (0.01, 1.0, 1_000, 1e-14, 4.5435, 4.5438),
    (0.01, 1.0, 10_000, 1e-12, 10.3465, 10.3468),
    (0.001, 1.0, 10_000, 1e-13, 1.3897, 1.3900),
]
# σ, q, T, upper bound of Opacus 1.6 (holds an absolute error of 0.01), upper bound of
# dp_accounting 0.6 with an interval of 1e-4; δ = 1e-6 throughout.
PUBLISHED = [
    (0.8, 0.001, 100, 0.270403364, 0.260339),
    (1.5, 0.001, 100, 0.039369419, 0.029269),
    (2.0, 0.001, 100, 0.029104537, 0.018962),
    (3.0, 0.001, 100, 0.021520093, 0.011278),
    (0.8, 0.05, 100, 6.741051942, 6.730629),
    (1.5, 0.05, 100, 1.953853136, 1.943736),
    (2.0, 0.05, 100, 1.283637380, 1.273560),
    (3.0, 0.05, 100, 0.767933790, 0.757884),
    (0.8, 0.2, 100, 24.333664178, 24.322620),
    (1.5, 0.2, 100, 8.498977859, 8.488586),
    (2.0, 0.2, 100, 5.672055609, 5.661788),
    (3.0, 0.2, 100, 3.381220510, 3.371055),
    (0.8, 0.001, 1_000, 0.477771266, 0.467695),
    (1.5, 0.001, 1_000, 0.099820660, 0.089884),
    (2.0, 0.001, 1_000, 0.071218783, 0.061314),
    (3.0, 0.001, 1_000, 0.047615931, 0.037767),
    (0.8, 0.05, 1_000, 19.525842805, 19.515033),
    (1.5, 0.05, 1_000, 6.209969247, 6.199695),
    (2.0, 0.05, 1_000, 4.172799867, 4.162611),
    (3.0, 0.05, 1_000, 2.527574326, 2.517457),
    (0.8, 0.001, 20_000, 1.296009258, 1.286152),
    (1.5, 0.001, 20_000, 0.437005109, 0.427622),
    (2.0, 0.001, 20_000, 0.305837940, 0.296706),
    (3.0, 0.001, 20_000, 0.194031031, 0.185361),
    (1.5, 0.05, 20_000, 38.306617914, 38.295546),
    (2.0, 0.05, 20_000, 24.421718570, 24.410972),
    (3.0, 0.05, 20_000, 13.961114699, 13.950659),
    (0.8, 0.001, 50_000, 2.034514808, 2.024833),
    (1.5, 0.001, 50_000, 0.704218385, 0.695254),
    (2.0, 0.001, 50_000, 0.491354910, 0.482802),
    (3.0, 0.001, 50_000, 0.309694161, 0.301900),
    (1.5, 0.05, 50_000, 73.190176724, 73.178536),
    (2.0, 0.05, 50_000, 45.236995861, 45.225847),
    (3.0, 0.05, 50_000, 24.942005643, 24.931311),
]
# σ, q, T, δ and the value of the Gaussian (central limit) approximation, which is not a bound.
GAUSSIAN_APPROXIMATION = [
    (1.0, 0.01, 1_000, 1e-5, 1.617712),
    (1.5, 0.04, 2_250, 1e-5, 6.601567),
    (0.8, 0.001, 100, 1e-6, 0.068749),
    (10.0, 0.01, 100, 1e-6, 0.033765),
    (50.0, 0.01, 100, 1e-6, 0.005849),
    (0.6, 1e-5, 100_000, 1e-9, 0.060507),
]


def bounds_of(q: float, sigma: float, steps: int, delta: float):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=q, steps=steps, delta=delta)
    return plan.epsilon()


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "low", "high"), CERTIFIED + TINY_DELTA)
def test_bounds_enclose_the_certified_interval_and_exceed_it_by_at_most_a_thousandth(
    q, sigma, steps, delta, low, high
):
    bounds = bounds_of(q, sigma, steps, delta)
    assert bounds.lower <= high
    assert low <= bounds.upper <= high * 1.001
    assert bounds.upper <= bounds.lower * 1.005


@pytest.mark.parametrize(("sigma", "q", "steps", "opacus", "google"), PUBLISHED)
def test_upper_bound_lies_in_the_window_that_other_libraries_leave(sigma, q, steps, opacus, google):
    bounds = bounds_of(q, sigma, steps, 1e-6)
    assert bounds.upper <= google * 1.0005 + 1e-6
    # Opacus' number is at most 0.02 above the truth, so the truth is at least this.
    assert opacus - 0.0201 <= bounds.upper <= opacus
    assert bounds.upper <= bounds.lower * 1.001


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "approximation"), GAUSSIAN_APPROXIMATION)
def test_pitfall_47_no_bound_falls_to_the_gaussian_approximation(
    sigma, q, steps, delta, approximation
):
    bounds = bounds_of(q, sigma, steps, delta)
    assert bounds.lower > approximation
    assert bounds.upper > approximation


def test_pitfall_47_both_directions_are_asked_and_the_worse_one_is_reported(monkeypatch):
    # Removing is worse wherever anybody looked; what counts is that neither is left out.
    mechanism = SampledGaussian(noise_multiplier=1.0, sampling_probability=0.3, steps=10)
    seen = []

    original = question.Question.epsilon

    def ask(self, direction, bound, fineness, enough=0.0):
        value = original(self, direction, bound, fineness, enough)
        seen.append((direction, bound, value))
        return value

    monkeypatch.setattr(question.Question, "epsilon", ask)
    bounds = PldEngine().epsilon(mechanism, 1e-5)
    uppers = {direction: value for direction, bound, value in seen if bound == "upper"}
    assert set(uppers) == {"add", "remove"}
    assert bounds.upper >= max(uppers.values()) * (1 - 1e-12)
    assert uppers["add"] < uppers["remove"]


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.01, 1.0, 1_000, 1e-5),
        (0.02, 1.0, 500, 1e-6),
        (0.1, 4.0, 1_000, 1e-8),
        (0.25, 5.0, 500, 1e-6),
        (0.01, 0.6, 1_000, 1e-6),
        (0.01, 1.0, 1, 1e-5),
    ],
)
def test_prv_accountant_with_both_directions_agrees_with_the_default_engine(q, sigma, steps, delta):
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    second = PrvEngine().epsilon(mechanism, delta)
    first = PldEngine().epsilon(mechanism, delta)
    assert second.lower <= first.upper
    assert first.lower <= second.upper
    assert first.upper < second.upper
    assert second.estimate == pytest.approx(first.estimate, rel=2e-3)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "published"),
    [
        (1.0, 0.01, 1_000, 1e-5, 2.101365),
        (1.5, 0.04, 2_250, 1e-5, 7.329111),
        (0.8, 0.001, 100, 1e-6, 1.371067),
        (2.0, 0.05, 1_000, 1e-6, 4.475501),
    ],
)
def test_renyi_bound_agrees_with_published_values_and_stays_above_the_tight_bound(
    sigma, q, steps, delta, published
):
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    loose = RdpEngine().epsilon(mechanism, delta).upper
    assert loose == pytest.approx(published, rel=0.02)  # integer orders only, so slightly above
    assert loose > PldEngine().epsilon(mechanism, delta).upper
