"""δ at an ε, the trade-off curve, and their commands: bounds on the safe side, and tight."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from veilspan.accounting import DeltaBounds, PrivacyPlan, TradeOff
from veilspan.accounting.__main__ import main
from veilspan.accounting.engines import CertifiedEngine, PldEngine, RdpEngine, SampledGaussian
from veilspan.accounting.engines.closed_form import gaussian_log_delta
from veilspan.accounting.engines.question import Question

probabilities = st.floats(-3.0, -0.1).map(lambda e: 10.0**e)
noises = st.floats(math.log(0.5), math.log(10.0)).map(math.exp)
SETTINGS = {"noise_multiplier": 1.0, "sampling_probability": 0.01, "steps": 1000, "delta": 1e-5}
ARGUMENTS = [
    *("--noise-multiplier", "1", "--sampling-probability", "0.01"),
    *("--steps", "1000", "--delta", "1e-5"),
]


def removed_once(epsilon, q, sigma):
    """δ(ε) of removing a record from one release: the worse direction of the two."""
    x = sigma**2 * math.log((math.expm1(epsilon) + q) / q) + 0.5
    return q * ndtr((1 - x) / sigma) - (math.expm1(epsilon) + q) * ndtr(-x / sigma)


@settings(max_examples=60, deadline=None)
@given(q=probabilities, sigma=noises, scale=st.floats(0.0, 4.0))
def test_delta_of_one_step_encloses_its_closed_form(q, sigma, scale):
    epsilon = scale * min(q * math.sqrt(math.expm1(sigma**-2)), 1 / sigma)
    exact = removed_once(epsilon, q, sigma)
    bounds = PrivacyPlan(
        noise_multiplier=sigma, sampling_probability=q, steps=1, delta=1e-5
    ).delta_at(epsilon)
    assert bounds.lower <= exact + 1e-15
    assert exact <= bounds.upper + 1e-15
    if exact > 1e-12:
        assert bounds.upper <= exact * 1.02


@settings(max_examples=16, deadline=None)
@given(q=probabilities, sigma=noises, steps=st.integers(1, 3000), exponent=st.floats(-20.0, -2.0))
def test_delta_and_epsilon_invert_each_other(q, sigma, steps, exponent):
    delta = 10.0**exponent
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    epsilon = CertifiedEngine().epsilon(mechanism, delta)
    above = CertifiedEngine().delta(mechanism, epsilon.upper)
    below = CertifiedEngine().delta(mechanism, epsilon.lower)
    assert above.lower <= delta * (1 + 1e-6)
    assert below.upper >= delta * (1 - 1e-6) or epsilon.lower == 0
    loose = RdpEngine().delta(mechanism, epsilon.upper).upper
    assert above.lower <= loose
    assert above.upper <= loose


@settings(max_examples=12, deadline=None)
@given(q=probabilities, sigma=noises, steps=st.integers(1, 500), epsilon=st.floats(0.0, 3.0))
def test_delta_falls_with_epsilon_and_noise_and_grows_with_steps(q, sigma, steps, epsilon):
    def bounds(sigma=sigma, steps=steps, epsilon=epsilon):
        mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
        return CertifiedEngine().delta(mechanism, epsilon)

    here = bounds()
    assert bounds(epsilon=epsilon + 0.5).lower <= here.upper
    assert bounds(sigma=sigma * 1.2).lower <= here.upper
    assert bounds(steps=steps + 100).upper >= here.lower


def test_both_directions_of_delta_are_asked_and_the_worse_one_is_reported(monkeypatch):
    mechanism = SampledGaussian(noise_multiplier=1.0, sampling_probability=0.3, steps=10)
    original, factor = Question.delta_at, {"remove": 1.0, "add": 1.0}

    def delta_at(self, epsilon, direction, bound, fineness):
        return factor[direction] * original(self, epsilon, direction, bound, fineness)

    monkeypatch.setattr(Question, "delta_at", delta_at)
    usual = PldEngine().delta(mechanism, 1.0)
    factor["remove"] = 0.1  # as if adding were worse
    other = PldEngine().delta(mechanism, 1.0)
    assert (usual.direction, other.direction) == ("remove", "add")
    assert usual.upper > other.upper > 0.1 * usual.upper


@pytest.mark.parametrize("sigma", [0.7, 5.0, 100.0, 1e5])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 30.0])
def test_delta_under_full_sampling_is_the_analytic_gaussian(sigma, epsilon):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=1.0, steps=9, delta=1e-5)
    bounds = plan.delta_at(epsilon)
    exact = math.exp(gaussian_log_delta(epsilon, 3 / sigma))
    assert bounds.lower <= exact <= bounds.upper
    assert bounds.upper - bounds.lower <= 1e-5 * exact + 1e-299  # where δ leaves the doubles
    nearly = SampledGaussian(noise_multiplier=sigma, sampling_probability=1 - 1e-9, steps=9)
    if exact > 1e-200 and sigma < 1e3:
        computed = PldEngine().delta(nearly, epsilon)
        assert computed.lower <= exact
        assert exact <= computed.upper * (1 + 1e-6)
        assert computed.upper <= exact * 1.02


def test_delta_is_sharp_down_to_tiny_values_where_float64_transforms_are_lost():
    plan = PrivacyPlan(**SETTINGS)
    bounds = plan.delta_at(plan.epsilon(1e-40).upper)
    assert 0.95e-40 < bounds.lower <= 1e-40 <= bounds.upper * 1.02


@pytest.mark.parametrize(("q", "epsilon"), [(1.0, 60.0), (0.01, 60.0), (0.01, 500.0)])
def test_delta_too_small_for_doubles_is_never_rounded_to_zero(q, epsilon):
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=q, steps=1, delta=1e-5)
    bounds = plan.delta_at(epsilon)
    assert 0 <= bounds.lower <= bounds.upper
    assert 0 < bounds.upper <= 1e-250


@pytest.mark.parametrize("sigma", [1e9, 1e14, 1e17])
def test_delta_of_much_noise_survives_cancellation(sigma):
    plan = PrivacyPlan(noise_multiplier=sigma, sampling_probability=1.0, steps=1, delta=1e-5)
    bounds = plan.delta_at(0.0)
    exact = 1 / sigma / math.sqrt(2 * math.pi)  # Φ(μ/2) - Φ(-μ/2) for a small μ
    assert bounds.lower <= exact <= bounds.upper


@pytest.mark.parametrize("epsilon", [5e-324, 1e-300, 1e-50])
def test_delta_at_hardly_any_epsilon_is_that_at_none(epsilon):
    plan = PrivacyPlan(**SETTINGS)
    here, none = plan.delta_at(epsilon), plan.delta_at(0.0)
    assert here.upper == pytest.approx(none.upper, rel=1e-6)
    assert here.lower == pytest.approx(none.lower, rel=1e-6)


def test_delta_without_noise_or_release_is_exact():
    bare = PrivacyPlan(**{**SETTINGS, "noise_multiplier": 0.0}).delta_at(5.0)
    assert bare.upper == 1.0
    assert bare.lower == pytest.approx(1 - 0.99**1000, rel=1e-6)
    assert PrivacyPlan(**{**SETTINGS, "steps": 0}).delta_at(0.0).upper == 0.0


def test_delta_beyond_the_range_of_doubles_is_a_looser_bound():
    mechanism = SampledGaussian(noise_multiplier=0.03, sampling_probability=0.01, steps=1000)
    bounds = CertifiedEngine().delta(mechanism, 30_000.0)
    assert "Rényi" in bounds.method
    assert bounds.lower == 0
    assert bounds.upper <= 1


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_tradeoff_of_the_gaussian_is_below_and_near_its_closed_form(mu):
    plan = PrivacyPlan(noise_multiplier=1 / mu, sampling_probability=1.0, steps=1, delta=1e-5)
    curve = plan.tradeoff()
    for alpha in (0.0, 1e-6, 1e-3, 0.05, 0.3, 0.7, 1.0):
        exact = float(ndtr(ndtri(1 - alpha) - mu))
        assert curve.type_two_error(alpha) <= exact
        assert curve.type_two_error(alpha) >= exact - 0.01
        assert curve.true_positive_rate(alpha) == 1 - curve.type_two_error(alpha)
    exact = 2 * ndtr(mu / 2) - 1
    assert exact <= curve.largest_advantage <= exact + 1e-6


@settings(max_examples=10, deadline=None)
@given(q=probabilities, sigma=noises)
def test_no_likelihood_ratio_test_beats_the_tradeoff_curve_in_either_direction(q, sigma):
    mechanism = PrivacyPlan(noise_multiplier=sigma, sampling_probability=q, steps=1, delta=1e-5)
    curve = mechanism.tradeoff(24)
    for x in np.linspace(-3 * sigma, 1 + 3 * sigma, 15):
        absent = float(ndtr(-x / sigma))
        present = float((1 - q) * ndtr(-x / sigma) + q * ndtr((1 - x) / sigma))
        assert curve.type_two_error(absent) <= 1 - present + 1e-12
        assert curve.type_two_error(1 - present) <= absent + 1e-12


@pytest.mark.parametrize("alpha", [0.0, 1e-320, 1e-306, 1e-300, 1e-3, 1.0])
def test_tradeoff_knows_no_end_of_doubles(alpha):
    curve = TradeOff(points=((720.0, 1e-12),))
    exact = 1 - 1e-12 - math.exp(min(720 + math.log(alpha), 1)) if alpha else 1 - 1e-12
    assert max(exact, 0) - 1e-11 <= curve.type_two_error(alpha) <= max(exact, 0)


def test_tradeoff_says_nothing_where_nothing_is_guaranteed():
    curve = TradeOff(points=((math.inf, 0.0), (2.0, 1.0)))
    assert curve.type_two_error(0.0) == 0.0
    assert curve.largest_advantage == 1.0
    assert TradeOff(points=()).type_two_error(0.5) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.delta_at(-1.0), r"epsilon is -1\.0"),
        (lambda plan: plan.delta_at(1.7e308), r"epsilon is 1\.7e\+308"),
        (lambda plan: plan.delta_at(math.nan), "epsilon is nan"),
        (lambda plan: plan.delta_at(math.inf), "epsilon is inf"),
        (lambda plan: plan.tradeoff(1), "points is 1"),
        (lambda plan: plan.tradeoff().type_two_error(1.5), r"type_one_error is 1\.5"),
        (lambda _: TradeOff(points=((-1.0, 0.1),)), "points holds"),
        (
            lambda _: DeltaBounds(
                lower=0.5, estimate=0.4, upper=1, epsilon=0, direction="both", method="test"
            ),
            "not ordered",
        ),
    ],
)
def test_senseless_questions_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(PrivacyPlan(**SETTINGS))


def test_delta_command_reports_the_upper_bound(capsys):
    assert main(["delta", "--epsilon", "2", *ARGUMENTS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["delta"] == report["delta_upper"] == PrivacyPlan(**SETTINGS).delta_at(2.0).upper
    assert 0 < report["delta_lower"] <= report["delta_upper"]
    assert main(["delta", "--epsilon", "2", *ARGUMENTS]) == 0
    assert "δ ≤ 2.6" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tradeoff", "delta", "epsilon"])
def test_curve_command_prints_a_monotone_curve(capsys, kind):
    assert main(["curve", "--of", kind, "--points", "5", *ARGUMENTS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    x, y = {
        "tradeoff": ("type_one_error", "type_two_error"),
        "delta": ("epsilon", "delta"),
        "epsilon": ("steps", "epsilon"),
    }[kind]
    assert len(report[x]) == len(report[y]) == 5
    assert report[x] == sorted(report[x])
    assert report[y] == sorted(report[y], reverse=kind != "epsilon")
    assert main(["curve", "--of", kind, "--points", "5", *ARGUMENTS]) == 0
    assert capsys.readouterr().out.count("\n") >= 6


@pytest.mark.parametrize(("sigma", "points"), [("0.08", "20"), ("0.1", "9"), ("0.2", "11")])
def test_every_printed_delta_holds_at_the_printed_epsilon(capsys, sigma, points):
    whole = ["--sampling-probability", "1", "--steps", "1", "--delta", "1e-9"]
    command = ["curve", "--of", "delta", "--points", points, "--noise-multiplier", sigma]
    assert main([*command, *whole]) == 0
    for row in capsys.readouterr().out.splitlines()[1:]:
        epsilon, delta = map(float, row.split())
        exact = math.exp(gaussian_log_delta(epsilon, 1 / float(sigma)))
        assert exact <= delta * (1 + 1e-9)


@pytest.mark.parametrize(("sigma", "points"), [("0.3", "20"), ("0.5", "20"), ("0.6", "12")])
def test_every_printed_miss_holds_at_the_printed_false_alarm(capsys, sigma, points):
    whole = ["--sampling-probability", "1", "--steps", "1", "--delta", "1e-6"]
    assert main(["curve", "--points", points, "--noise-multiplier", sigma, *whole]) == 0
    for row in capsys.readouterr().out.splitlines()[1:-1]:
        alarms, misses = map(float, row.split())
        assert misses <= ndtr(-ndtri(alarms) - 1 / float(sigma))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["delta", "--epsilon", "-1", *ARGUMENTS], "epsilon is -1.0"),
        (["curve", *ARGUMENTS, "--points", "1"], "points is 1"),
        (["curve", "--noise-multiplier", "0", *ARGUMENTS[2:]], "no curve"),
    ],
)
def test_bad_input_to_the_commands_is_one_clear_line(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [(0.01, 1.0, 1000, 1e-5), (0.001, 0.6, 10_000, 1e-7), (0.1, 2.0, 100, 1e-6)],
)
def test_error_shrinks_on_demand(q, sigma, steps, delta):
    mechanism = SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)
    wider = PldEngine().epsilon(mechanism, delta)
    for width in (1e-4, 1e-5, 3e-6):
        engine = PldEngine(relative_width=width, largest_transform=1 << 22)
        bounds = engine.epsilon(mechanism, delta)
        assert bounds.upper <= bounds.lower * (1 + width)
        assert wider.lower <= bounds.lower <= bounds.upper <= wider.upper
        wider = bounds
