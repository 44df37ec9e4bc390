"""Batches of a fixed size: bounds against releases that are worked out batch by batch."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilspan.accounting import Ledger, LedgerError, Phases, PrivacyPlan
from veilspan.accounting.__main__ import main
from veilspan.accounting.engines import CertifiedEngine, PldEngine, RdpEngine, SampledGaussian
from veilspan.accounting.engines.mirrored import MirroredStep
from veilspan.accounting.engines.protocol import EngineError

LAW: dict[str, Any] = {"sampling": "without_replacement", "relation": "replace"}
SETTINGS: dict[str, Any] = {
    "noise_multiplier": 2.0,
    "sampling_probability": 0.01,
    "steps": 1000,
    "delta": 1e-5,
}


def mechanism(share, sigma, steps=1):
    return SampledGaussian(noise_multiplier=sigma, sampling_probability=share, steps=steps, **LAW)


def outputs(values, size, sigma, x):
    """Density of one release over a data set, every batch of that size listed."""
    batches = list(itertools.combinations(values, size))
    density = sum(np.exp(-(((x - sum(batch)) / sigma) ** 2) / 2) for batch in batches)
    return density / len(batches) / sigma / math.sqrt(2 * math.pi)


def hockey_stick(p, q, epsilon, cell):
    return float(np.sum(np.maximum(p - math.exp(epsilon) * q, 0.0)) * cell)


value = st.floats(-1, 1, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    others=st.lists(value, min_size=2, max_size=6),
    first=value,
    second=value,
    size=st.integers(1, 6),
    sigma=st.floats(0.4, 5),
    epsilon=st.floats(0, 3),
)
def test_no_pair_of_data_sets_has_a_larger_delta(others, first, second, size, sigma, epsilon):
    size = min(size, len(others))
    x, cell = np.linspace(-8 - 12 * sigma, 8 + 12 * sigma, 6001, retstep=True)
    p, q = (outputs([one, *others], size, sigma, x) for one in (first, second))
    bound = CertifiedEngine().delta(mechanism(size / (len(others) + 1), sigma), epsilon).upper
    assert hockey_stick(p, q, epsilon, cell) <= bound + 1e-9
    assert hockey_stick(q, p, epsilon, cell) <= bound + 1e-9


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_one_step_is_attained_by_records_that_all_point_the_other_way(share):
    total, sigma = 10, 1.3
    x, cell = np.linspace(-30, 30, 60001, retstep=True)
    p, q = (outputs([one] + [-1.0] * (total - 1), int(share * total), sigma, x) for one in (1, -1))
    for epsilon in (0.0, 0.3, 1.0):
        bounds = CertifiedEngine().delta(mechanism(share, sigma), epsilon)
        exact = hockey_stick(p, q, epsilon, cell)
        assert exact <= bounds.upper + 1e-6  # the error of the sum over x
        assert bounds.upper == pytest.approx(exact, rel=2e-3)
        assert bounds.lower == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("sampling", ["without_replacement", "poisson"])
@pytest.mark.parametrize("sigma", [0.7, 1.3, 5.0])
def test_delta_at_zero_is_never_below_its_closed_form(share, sampling, sigma):
    one = SampledGaussian(
        noise_multiplier=sigma,
        sampling_probability=share,
        steps=1,
        relation="replace",
        sampling=sampling,
    )
    exact = share * math.erf(1 / sigma / math.sqrt(2))  # the grid keeps it: no slack hides a loss
    bounds = CertifiedEngine().delta(one, 0.0)
    assert exact <= bounds.upper <= exact * (1 + 1e-5)


# Neighbours that attain one step, and others: a step may have other neighbours than the one before.
PAIRS = [([-1.0] * 5, 1.0, -1.0), ([0.0] * 5, 1.0, -1.0), ([1, -1, 0.5, 0, -0.5], 1.0, -0.2)]


@pytest.mark.parametrize(("others", "first", "second"), PAIRS)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 1.5])
def test_two_steps_of_any_two_pairs_stay_below_the_bound(others, first, second, epsilon):
    sigma, size = 1.5, 2
    x, cell = np.linspace(-20, 20, 801, retstep=True)
    one = [outputs([value, *others], size, sigma, x) for value in (first, second)]
    bound = CertifiedEngine().delta(mechanism(size / 6, sigma, steps=2), epsilon)
    for also_others, also_first, also_second in PAIRS:  # a step may depend on the one before
        for turned in ((also_first, also_second), (also_second, also_first)):
            two = [outputs([value, *also_others], size, sigma, x) for value in turned]
            p, q = (np.outer(a, b) for a, b in zip(one, two, strict=True))
            assert hockey_stick(p, q, epsilon, cell**2) <= bound.upper + 1e-9
    attack = [outputs([value] + [-1.0] * 5, size, sigma, x) for value in (1.0, -1.0)]
    p, q = (np.outer(a, a) for a in attack)
    assert bound.lower <= hockey_stick(p, q, epsilon, cell**2) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(1e-5, 0.99),
    sigma=st.floats(0.5, 30),
    spacing=st.floats(1e-3, 0.05),
    tail=st.sampled_from([1e-8, 1e-14]),
)
def test_the_loss_on_its_grid_is_a_law_that_mirrors_itself(share, sigma, spacing, tail):
    step = MirroredStep(share, sigma)
    loss = step.dominating(spacing * step.loss_scale(), tail)
    assert math.fsum(loss.mass) + loss.infinite == pytest.approx(1, abs=1e-14)
    assert loss.infinite <= tail
    assert np.all(loss.mass >= 0)
    value = dict(zip(loss.index.tolist(), loss.mass.tolist(), strict=True))
    last = max(value)
    for index, mass in value.items():
        if 0 < index < last:
            image = mass * math.exp(-loss.spacing * index)
            assert value[-index] == pytest.approx(image, rel=1e-12)
    # Probabilities of the other data set: they must not exceed 1 in total.
    assert math.fsum(loss.mass * np.exp(-loss.loss)) <= 1 + 1e-13


# Upper bounds of dp-accounting 0.6.0 by Rényi moments: SampledWithoutReplacementDpEvent(n, b,
# GaussianDpEvent(sigma / 2)), as its noise is relative to the sensitivity of a replacement, 2.
RENYI = [
    (100_000, 1000, 1.0, 1000, 1e-5, 20.987072439841914),
    (1000, 10, 2.0, 1000, 1e-5, 3.576111482350549),
    (10, 1, 4.0, 100, 1e-5, 5.3790096960759),
    (100_000, 1000, 8.0, 1000, 1e-5, 0.6389706998698284),
    (2, 1, 10.0, 100, 1e-5, 10.927543237539394),
    (1000, 1, 0.7, 10_000, 1e-6, 82.37657166211916),
]


@pytest.mark.parametrize(("records", "size", "sigma", "steps", "delta", "renyi"), RENYI)
def test_bounds_are_tighter_than_renyi_moments(records, size, sigma, steps, delta, renyi):
    bounds = CertifiedEngine().epsilon(mechanism(size / records, sigma, steps), delta)
    assert 0.8 * bounds.upper < bounds.lower < bounds.upper < renyi


def test_fixed_sizes_cost_more_than_poisson_samples_and_less_than_none():
    fixed = PrivacyPlan(**SETTINGS, **LAW).epsilon()
    poisson = PrivacyPlan(**SETTINGS, relation="replace").epsilon()
    assert fixed.lower > poisson.upper  # so that counting them as Poisson samples is an error
    everything = PrivacyPlan(**{**SETTINGS, "sampling_probability": 1.0}, **LAW).epsilon()
    assert fixed.upper < everything.upper
    full = {**SETTINGS, "sampling_probability": 1.0, "sampling": "full_batch"}
    assert everything == PrivacyPlan(**full, relation="replace").epsilon()


@pytest.mark.parametrize(("sigma", "fixed", "poisson"), [(1.0, 14.83, 2.844), (2.0, 2.199, 1.206)])
def test_numbers_of_the_guide(sigma, fixed, poisson):
    values = {**SETTINGS, "noise_multiplier": sigma}
    assert 0.999 * fixed < PrivacyPlan(**values, **LAW).epsilon().upper <= fixed
    assert 0.999 * poisson < PrivacyPlan(**values, relation="replace").epsilon().upper <= poisson


@settings(max_examples=25, deadline=None)
@given(share=st.floats(1e-4, 0.9), sigma=st.floats(0.6, 10), steps=st.integers(1, 500))
def test_more_noise_fewer_steps_and_smaller_batches_cost_less(share, sigma, steps):
    epsilon = PldEngine(one_sided=True).epsilon
    base = epsilon(mechanism(share, sigma, steps), 1e-6).upper * (1 + 1e-3)
    assert epsilon(mechanism(share, sigma * 1.05, steps), 1e-6).upper <= base
    assert epsilon(mechanism(share * 0.95, sigma, steps), 1e-6).upper <= base
    assert epsilon(mechanism(share, sigma, max(steps - steps // 20, 1)), 1e-6).upper <= base


@pytest.mark.parametrize("sigma", [0.395, 0.385])
def test_calibration_sees_an_epsilon_as_small_as_a_plan_does(sigma):
    few = mechanism(5.44e-5, sigma, 8)
    whole = CertifiedEngine().epsilon(few, 3.7e-4).upper
    quick = CertifiedEngine(pld=PldEngine(one_sided=True)).epsilon(few, 3.7e-4).upper
    assert whole <= quick <= whole * 1.001


def test_nothing_and_no_noise_have_their_exact_answers():
    assert CertifiedEngine().epsilon(mechanism(0.1, 0.0), 1e-5).upper == math.inf
    assert CertifiedEngine().delta(mechanism(0.1, 0.0, 2), 1.0).lower == pytest.approx(0.19)
    assert CertifiedEngine().epsilon(mechanism(0.1, 1.0, 0), 1e-5).upper == 0


def test_delta_epsilon_and_the_tradeoff_agree():
    plan = PrivacyPlan(**SETTINGS, **LAW)
    bounds = plan.epsilon()
    assert plan.delta_at(bounds.upper).lower <= 1e-5 <= plan.delta_at(bounds.upper * 0.999).upper
    rate = plan.tradeoff().true_positive_rate(0.01)
    assert rate <= math.exp(bounds.upper) * 0.01 + 1e-5
    assert rate > PrivacyPlan(**SETTINGS, relation="replace").tradeoff().true_positive_rate(0.01)


def test_phases_may_mix_the_ways_to_draw():
    fixed, poisson = PrivacyPlan(**SETTINGS, **LAW), PrivacyPlan(**SETTINGS, relation="replace")
    both = Phases(plans=[fixed, poisson]).epsilon()
    assert max(fixed.epsilon().upper, poisson.epsilon().upper) < both.lower
    assert both.upper < fixed.epsilon().upper + poisson.epsilon().upper
    assert both.lower < both.upper


def test_calibration_and_commands_take_fixed_sizes(capsys):
    law = {"delta": 1e-5, "sampling_probability": 0.01, "steps": 1000, **LAW}
    plan = PrivacyPlan.calibrate(target_epsilon=2.0, **law)
    assert 1.99 < plan.epsilon().upper <= 2.0
    options = ["--sampling-probability", "0.01", "--steps", "1000", "--delta", "1e-5", "--json"]
    options += ["--sampling", "without_replacement", "--relation", "replace"]
    assert main(["noise", "--target-epsilon", "2", *options]) == 0
    assert json.loads(capsys.readouterr().out)["noise_multiplier"] == plan.noise_multiplier
    assert main(["epsilon", "--noise-multiplier", "2", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["epsilon"] == PrivacyPlan(**SETTINGS, **LAW).epsilon().upper
    assert report["sampling"] == "without_replacement"
    assert main(["epsilon", "--noise-multiplier", "2", *options[:-2]]) == 2
    assert "Use relation='replace'" in capsys.readouterr().err


def test_statement_and_ledger_name_the_law(tmp_path):
    plan = PrivacyPlan(**SETTINGS, **LAW, unit="document", expected_batch_size=500)
    text = plan.statement()
    assert "share, 0.01, of the documents" in text
    assert "without replacement" in text
    assert "Poisson" not in text
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plan, budget_epsilon=3.0) as ledger:
        ledger.append(step=0)
        assert 0 < ledger.spent().upper < plan.epsilon().upper
    poisson = PrivacyPlan(**SETTINGS, relation="replace", unit="document", expected_batch_size=500)
    with pytest.raises(LedgerError, match="'without_replacement' there and 'poisson' here"):
        Ledger.open(path, plan=poisson)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relation": "add_remove"}, "show how many records there are"),
        ({"records_per_unit": 2}, "records_per_unit is 2"),
        ({"batch_cap": 5}, "batch_cap is 5, but sampling is 'without_replacement'"),
    ],
)
def test_what_is_not_counted_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan(**{**SETTINGS, **LAW, **change})


def test_unknown_draws_and_engines_that_do_not_count_them_are_refused():
    with pytest.raises(ValueError, match="sampling is 'shuffled'; supported is 'poisson' or"):
        SampledGaussian(
            noise_multiplier=1.0, sampling_probability=0.1, steps=1, sampling="shuffled"
        )
    with pytest.raises(EngineError, match="add/remove only"):
        RdpEngine().epsilon(mechanism(0.1, 1.0), 1e-5)
