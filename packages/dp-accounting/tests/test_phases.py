"""Different phases on the same data add up to bounds that enclose the exact sum."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import PoissonSubsampledGaussianMechanism
from scipy.integrate import quad
from scipy.special import ndtr

from veilspan.accounting import Ledger, LedgerError, Phases, PrivacyPlan
from veilspan.accounting.__main__ import main
from veilspan.accounting.engines import (
    CertifiedEngine,
    Composed,
    EngineError,
    PldEngine,
    RdpEngine,
    SampledGaussian,
)
from veilspan.accounting.engines.closed_form import gaussian_epsilon
from veilspan.accounting.engines.compose import Composition
from veilspan.accounting.engines.discretise import GridLoss
from veilspan.accounting.engines.prv import PrvEngine
from veilspan.accounting.engines.question import Question

probabilities = st.floats(-3.0, -0.1).map(lambda e: 10.0**e)
noises = st.floats(math.log(0.5), math.log(10.0)).map(math.exp)


def plan(sigma, q, steps, **rest):
    return PrivacyPlan(
        noise_multiplier=sigma, sampling_probability=q, steps=steps, **{"delta": 1e-5, **rest}
    )


def part(q, sigma, steps=1):
    return SampledGaussian(noise_multiplier=sigma, sampling_probability=q, steps=steps)


def one_step_delta(direction, epsilon, q, sigma):
    sign = 1 if direction == "remove" else -1
    growth = math.expm1(sign * epsilon) + q
    if growth <= 0:  # no outcome has so low (so high) a loss
        return -math.expm1(epsilon) if direction == "remove" else 0.0
    x = sigma**2 * math.log(growth / q) + 0.5
    if direction == "remove":
        return q * ndtr((1 - x) / sigma) - (math.expm1(epsilon) + q) * ndtr(-x / sigma)
    with_record = (1 - q) * ndtr(x / sigma) + q * ndtr((x - 1) / sigma)
    return ndtr(x / sigma) - math.exp(epsilon) * with_record


def two_step_delta(direction, epsilon, first, second):
    """Integrate the second release's δ over the loss of the first."""
    q, sigma = first
    sign = 1 if direction == "remove" else -1
    weights = ((1 - q, 0.0), (q, 1.0)) if direction == "remove" else ((1.0, 0.0),)
    total = 0.0
    for weight, mean in weights:

        def integrand(x, mean=mean):
            loss = sign * math.log1p(q * math.expm1((x - 0.5) / sigma**2))
            density = math.exp(-(((x - mean) / sigma) ** 2) / 2) / sigma / math.sqrt(2 * math.pi)
            return density * one_step_delta(direction, epsilon - loss, *second)

        ends = mean - 9 * sigma, mean + 9 * sigma
        total += weight * quad(integrand, *ends, limit=400, epsabs=1e-14, epsrel=1e-11)[0]
    return total


@pytest.mark.parametrize("direction", ["remove", "add"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0.3, 0.8), (0.05, 1.0)),
        ((0.05, 1.0), (0.9, 3.0)),
        ((0.01, 0.5), (0.5, 10.0)),
        ((1.0, 2.0), (0.2, 0.7)),  # one phase without sampling
    ],
)
def test_two_different_releases_equal_the_integral_over_the_first(direction, first, second):
    question = Question((part(*first), part(*second)), 1e-4, 1 << 20)
    for epsilon in (0.02, 0.1, 0.3):
        exact = two_step_delta(direction, epsilon, first, second)
        upper = question.delta_at(epsilon, direction, "upper", 0.003)
        lower = question.delta_at(epsilon, direction, "lower", 0.003)
        assert lower <= exact * (1 + 1e-9) + 1e-12
        assert exact <= upper * (1 + 1e-9) + 1e-12
        assert upper <= exact * 1.01 + 1e-8
        assert lower >= exact * 0.99 - 1e-8


def test_infinite_losses_of_all_phases_are_counted():
    one = GridLoss(0.0, 0.1, np.array([0]), np.array([0.9]), 0.1)
    two = GridLoss(0.0, 0.1, np.array([0]), np.array([0.8]), 0.2)
    exact = pytest.approx(1 - 0.9**2 * 0.8, rel=1e-9)
    for bound in ("upper", "lower"):
        composed = Composition([(one, 2), (two, 1)], 0.5, bound, largest_transform=1 << 10)
        assert composed.delta(1.0) == exact


def test_bounds_that_contradict_each_other_are_refused(monkeypatch):
    original = Question.epsilon

    def too_small(self, direction, bound, fineness, enough=0.0):
        return original(self, direction, bound, fineness, enough) * (
            0.9 if bound == "upper" else 1.0
        )

    monkeypatch.setattr(Question, "epsilon", too_small)
    with pytest.raises(EngineError, match="contradict"):
        PldEngine().epsilon(part(0.1, 1.0, 10), 1e-5)


def test_equal_phases_merge_into_one():
    parts = Phases(plans=[plan(1.0, 0.01, 400), plan(1.0, 0.01, 600)])
    assert parts.epsilon() == plan(1.0, 0.01, 1000).epsilon()
    assert len(parts.mechanism.parts) == 1
    assert parts.mechanism.steps == 1000


@settings(max_examples=12, deadline=None)
@given(
    phases=st.lists(st.tuples(noises, probabilities, st.integers(1, 1000)), min_size=2, max_size=3)
)
def test_sum_is_above_each_phase_and_below_what_simple_addition_gives(phases):
    plans = [plan(*phase) for phase in phases]
    together = Phases(plans=plans).epsilon()
    each = [p.epsilon() for p in plans]
    simple = sum(p.epsilon(1e-5 / len(plans)).upper for p in plans)
    assert together.upper >= max(bounds.lower for bounds in each)
    assert together.lower <= simple
    assert together.upper <= simple * 1.001 + 1e-6
    assert Phases(plans=plans[::-1]).epsilon().lower <= together.upper
    assert together.lower <= RdpEngine().epsilon(Phases(plans=plans).mechanism, 1e-5).upper


@settings(max_examples=12, deadline=None)
@given(q=probabilities, sigma=noises, steps=st.integers(2, 1000), split=st.floats(0.01, 0.99))
def test_phases_that_hardly_differ_cost_what_one_phase_costs(q, sigma, steps, split):
    first = max(1, int(split * steps))
    plans = [plan(sigma, q, first), plan(sigma * (1 + 1e-12), q, steps - first)]
    one, two = plan(sigma, q, steps).epsilon(), Phases(plans=plans).epsilon()
    assert two.lower <= one.upper * (1 + 1e-9)
    assert one.lower <= two.upper * (1 + 1e-9)
    assert two.upper <= one.upper * 1.01 + 1e-6


def test_phases_without_sampling_are_one_gaussian():
    phases = Phases(plans=[plan(30.0, 1.0, 10), plan(20.0, 1.0, 10)])
    bounds = phases.epsilon()
    exact = gaussian_epsilon(math.sqrt(10 / 900 + 10 / 400), 1e-5)
    assert bounds.method == "analytic Gaussian"
    assert bounds.lower <= exact <= bounds.upper
    nearly = Phases(plans=[plan(30.0, 1.0, 10), plan(20.0, 1 - 1e-9, 10)]).epsilon()
    assert nearly.lower <= exact <= nearly.upper * (1 + 1e-6)
    assert nearly.upper <= exact * 1.001


@pytest.mark.filterwarnings("ignore:Assuming that true epsilon")
def test_other_accountant_agrees_on_a_warm_up_and_a_run():
    settings_of = [(0.02, 2.0, 300), (0.01, 1.0, 700)]
    phases = Phases(plans=[plan(sigma, q, steps) for q, sigma, steps in settings_of])
    losses = [
        PoissonSubsampledGaussianMechanism(sampling_probability=q, noise_multiplier=sigma)
        for q, sigma, _ in settings_of
    ]
    other = PRVAccountant(
        losses, eps_error=0.02, delta_error=1e-8, max_self_compositions=[300, 700], eps_max=12.0
    )
    low, _, high = other.compute_epsilon(1e-5, [300, 700])
    bounds = phases.epsilon()
    assert low <= bounds.lower
    assert bounds.upper <= high
    assert bounds.upper <= bounds.lower * 1.001


def test_phases_of_very_different_size_stay_tight():
    bounds = Phases(plans=[plan(0.6, 1e-5, 1000), plan(50.0, 0.01, 500)]).epsilon()
    assert bounds.upper <= bounds.lower * 1.002
    assert 0.0118 < bounds.upper < 0.0119


def test_one_phase_without_noise_spoils_the_sum_and_an_empty_one_adds_nothing():
    good = plan(1.0, 0.01, 100)
    assert math.isinf(Phases(plans=[good, plan(0.0, 0.01, 1)]).epsilon().upper)
    assert Phases(plans=[good, plan(0.0, 0.01, 0)]).epsilon() == good.epsilon()
    assert Phases(plans=[good, plan(1.0, 0.0, 9)]).epsilon() == good.epsilon()


def test_queries_of_a_sum_fit_together():
    phases = Phases(plans=[plan(2.0, 0.01, 500), plan(1.0, 0.005, 1000)])
    bounds = phases.epsilon()
    assert phases.delta_at(bounds.upper).lower <= 1e-5
    assert phases.delta_at(bounds.lower).upper >= 1e-5
    assert phases.epsilon(1e-8).lower > bounds.upper
    misses = phases.tradeoff(16).type_two_error(0.01)
    assert misses < min(p.tradeoff(16).type_two_error(0.01) for p in phases.plans)
    assert misses >= 1 - 1e-5 - math.exp(bounds.upper) * 0.01 - 0.01


def test_statement_of_a_sum_names_every_phase():
    plans = [
        plan(2.0, 0.01, 500, unit="document", expected_batch_size=64),
        plan(1.0, 0.005, 1000, unit="document"),
    ]
    text = Phases(plans=plans).statement()
    for phrase in (
        "1,500 noisy releases in 2 phases",
        "Phase 1: 500 steps",
        "Phase 2: 1,000 steps",
    ):
        assert phrase in text
    for phrase in (
        "probability 0.005",
        "noise multiplier 2",
        "same data",
        "one document",
        "constant 64",
    ):
        assert phrase in text
    assert "fixed without looking" in text


@pytest.mark.parametrize(
    ("plans", "delta", "message"),
    [
        ([], None, "plans is empty"),
        ([plan(1.0, 0.1, 1), plan(1.0, 0.1, 1, unit="user")], None, "unit differs"),
        ([plan(1.0, 0.1, 1), plan(1.0, 0.1, 1, delta=1e-6)], None, "delta differs"),
        ([plan(1.0, 0.1, 1)], 0.0, "delta is 0.0"),
    ],
)
def test_sums_that_mean_nothing_are_refused(plans, delta, message):
    with pytest.raises(ValueError, match=message):
        Phases(plans=plans, delta=delta)
    with pytest.raises(ValueError, match="parts is empty"):
        Composed(parts=())


def test_prv_accountant_refuses_several_phases():
    two = Composed(parts=(part(0.1, 1.0), part(0.2, 1.0)))
    with pytest.raises(EngineError, match="one phase"):
        PrvEngine().epsilon(two, 1e-5)
    assert CertifiedEngine().epsilon(two, 1e-5).upper > 0


@pytest.fixture
def ledgers(tmp_path):
    """Two runs: 3 releases of one plan, 2 of another."""
    paths = []
    for name, spent, used in (("a", plan(1.0, 0.01, 50), 3), ("b", plan(2.0, 0.1, 70), 2)):
        path = tmp_path / f"{name}.jsonl"
        with Ledger.create(path, spent, run_id=name) as ledger:
            for step in range(used):
                ledger.append(step=step)
        paths.append(str(path))
    return paths


def test_ledgers_of_runs_on_the_same_data_are_summed_up_by_their_releases(capsys, ledgers):
    expected = Phases(plans=[plan(1.0, 0.01, 3), plan(2.0, 0.1, 2)]).epsilon()
    assert main(["ledger", *ledgers, "--same-data", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["epsilon"] == report["epsilon_upper"] == expected.upper
    assert report["releases"] == 5
    assert [run["run_id"] for run in report["runs"]] == ["a", "b"]
    assert main(["ledger", *ledgers, "--same-data"]) == 0
    assert f"all runs together: {expected}" in capsys.readouterr().out
    assert main(["ledger", *ledgers, "--same-data", "--delta", "1e-7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] > expected.upper


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, [], "add --same-data"),
        ({"unit": "user"}, ["--same-data"], "unit differs"),
        ({"delta": 1e-6}, ["--same-data"], "delta differs"),
        ("twice", ["--same-data"], "given twice"),
        ("one", ["--delta", "1e-6"], "delta is for sums"),
    ],
)
def test_ledgers_that_cannot_be_summed_up_are_refused(
    capsys, ledgers, tmp_path, change, options, message
):
    files = list(ledgers)
    if change == "twice":
        files.append(files[0])
    elif change == "one":
        files = files[:1]
    elif change:
        other = tmp_path / "other.jsonl"
        Ledger.create(other, plan(1.0, 0.01, 50, **change)).close()
        files.append(str(other))
    assert main(["ledger", *files, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.fixture
def ledger_of(tmp_path):
    """Return a function that writes the ledger of a run on data of a name."""

    def write(name, data):
        path = tmp_path / name
        with Ledger.create(path, plan(1.0, 0.01, 50), data=data) as ledger:
            ledger.append(step=0)
        return str(path)

    return write


def test_ledgers_that_name_the_same_data_are_summed_up_without_a_word(capsys, ledger_of):
    first, second = ledger_of("a", "clinic notes"), ledger_of("b", "clinic notes")
    assert main(["ledger", first, second, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["releases"] == 2
    with Ledger.open(first, read_only=True) as ledger:
        assert ledger.data == "clinic notes"


@pytest.mark.parametrize("options", [[], ["--same-data"]])
@pytest.mark.parametrize("between", [[], [None]])
def test_ledgers_of_different_data_are_never_added_up(capsys, ledger_of, options, between):
    names = ["clinic notes", *between, "court records"]
    paths = [ledger_of(str(place), name) for place, name in enumerate(names)]
    assert main(["ledger", *paths, *options]) != 0
    message = capsys.readouterr().err
    assert "'clinic notes'" in message
    assert "'court records'" in message
    assert "one by one" in message


def test_a_ledger_without_a_name_needs_the_users_word(capsys, ledger_of):
    paths = [ledger_of("a", "clinic notes"), ledger_of("b", None)]
    assert main(["ledger", *paths]) != 0
    assert f"{paths[1]} of 2 ledgers" in capsys.readouterr().err
    assert main(["ledger", *paths, "--same-data"]) == 0


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_of_data_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="data is"):
        Ledger.create(tmp_path / "ledger", plan(1.0, 0.01, 50), data=name)
    assert not (tmp_path / "ledger").exists()


def test_one_ledger_twice_is_an_error_of_the_ledger(ledgers):
    with Ledger.open(ledgers[0], read_only=True) as ledger, pytest.raises(LedgerError):
        Phases.from_ledgers([ledger, ledger])
