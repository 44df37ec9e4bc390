"""Full batches and samples with a cap: charged where they must be, refused where unknown."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilspan.accounting import Ledger, LedgerError, Phases, PrivacyPlan
from veilspan.accounting.__main__ import main
from veilspan.accounting.engines import (
    CertifiedEngine,
    EngineError,
    PldEngine,
    RdpEngine,
    SampledGaussian,
)
from veilspan.accounting.engines.overflow import overflow_probability
from veilspan.accounting.engines.prv import PrvEngine

SETTINGS = {"noise_multiplier": 1.0, "sampling_probability": 0.01, "steps": 1000, "delta": 1e-5}
ROOM = {"sampling": "truncated_poisson", "batch_cap": 1200, "most_records": 100_000}


@settings(max_examples=60, deadline=None)
@given(records=st.integers(1, 200), q=st.floats(0.001, 0.999), room=st.integers(1, 200))
def test_overflow_probability_is_at_least_the_binomial_tail(records, q, room):
    exact = math.fsum(
        math.comb(records, k) * q**k * (1 - q) ** (records - k)
        for k in range(room + 1, records + 1)
    )
    bound = overflow_probability(records, q, room)
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * (1 + 1e-5) + 1e-300


def test_overflow_probability_at_its_ends():
    assert overflow_probability(10, 0.5, 10) == 0
    assert overflow_probability(10, 0.0, 1) == 0
    assert overflow_probability(10, 1.0, 9) == 1
    assert 0 < overflow_probability(10**9, 1e-6, 10**8) <= 1e-299  # never rounded to nothing


@pytest.mark.parametrize("records", [10**7, 10**9, 2**31, 2**32 + 100, 10**10, 10**15])
@pytest.mark.parametrize("room", [104, 120, 180, 300])
def test_overflow_probability_of_many_records_is_that_of_their_poisson_limit(records, room):
    mean = 100.0
    # Of n records the logarithm of a chance of k differs from its limit by about (k - mean)²/(2n).
    limit = math.fsum(
        math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(room + 1, 1000)
    )
    bound = overflow_probability(records, mean / records, room)
    assert bound == pytest.approx(limit, rel=2e-6 + (room - mean + 30) ** 2 / records)
    assert records < 10**12 or bound >= limit


def test_cap_on_billions_of_records_that_is_often_passed_is_refused():
    wanted = {**SETTINGS, "sampling_probability": 1e-7, "sampling": "truncated_poisson"}
    with pytest.raises(ValueError, match="batch_cap is 1040"):
        PrivacyPlan(**wanted, batch_cap=1040, most_records=10**10)


def outputs(values, q, cap, x, sigma):
    """Density of one release over a data set, every sample listed, cut to its first records."""
    density = np.zeros_like(x)
    for chosen in itertools.product((False, True), repeat=len(values)):
        chance = math.prod(q if inside else 1 - q for inside in chosen)
        sample = [v for v, inside in zip(values, chosen, strict=True) if inside][:cap]
        density += chance * np.exp(-(((x - sum(sample)) / sigma) ** 2) / 2)
    return density / sigma / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("others", [[-1.0] * 6, [1.0] * 6, [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]])
@pytest.mark.parametrize(("relation", "instead"), [("add_remove", []), ("replace", [-1.0])])
def test_exact_release_with_cut_samples_stays_within_the_charged_delta(others, relation, instead):
    q, cap, sigma = 0.3, 4, 1.0
    x = np.linspace(-20, 20, 20001)
    first = outputs([1.0, *others], q, cap, x, sigma)
    second = outputs([*instead, *others], q, cap, x, sigma)
    mechanism = SampledGaussian(
        noise_multiplier=sigma,
        sampling_probability=q,
        steps=1,
        relation=relation,
        overflow=overflow_probability(7, q, cap),
    )
    for epsilon in (0.0, 0.2, 0.5, 1.0):
        bound = CertifiedEngine().delta(mechanism, epsilon).upper
        for p, r in ((first, second), (second, first)):
            exact = np.trapezoid(np.maximum(p - math.exp(epsilon) * r, 0.0), x)
            assert exact <= bound + 1e-9


def test_cut_samples_are_charged_to_delta_in_full():
    cut = PrivacyPlan(**SETTINGS, **ROOM)
    plain = PrivacyPlan(**SETTINGS)
    eta = cut.cut_probability
    assert eta == 1000 * overflow_probability(100_000, 0.01, 1200)
    for epsilon in (0.5, 1.5, 2.5):
        charge = (1 + math.exp(epsilon)) * eta
        bounds, uncut = cut.delta_at(epsilon), plain.delta_at(epsilon)
        assert bounds.upper == pytest.approx(uncut.upper + charge)
        assert bounds.lower == pytest.approx(max(uncut.lower - charge, 0))
    bounds = cut.epsilon()
    assert bounds.lower < plain.epsilon().upper < bounds.upper
    least = plain.epsilon(1e-5 + (1 + math.exp(bounds.upper)) * eta)  # cuts may also help
    assert bounds.lower == pytest.approx(least.lower)
    assert cut.delta_at(bounds.upper).upper <= 1e-5 * 1.001
    assert cut.delta_at(bounds.upper * 0.99).upper > 1e-5  # and no looser than that
    assert "charged" in bounds.method


def test_plan_with_a_cap_has_spent_nothing_before_its_first_step(tmp_path):
    plan = PrivacyPlan(**SETTINGS, **ROOM)
    assert plan.epsilon_after(0).upper == 0
    with Ledger.create(tmp_path / "ledger.jsonl", plan, budget_epsilon=1.0) as ledger:
        assert ledger.spent().upper == 0
        ledger.append(step=0)
        assert 0 < ledger.spent().upper < 1
        assert ledger.most_releases is not None
        assert plan.epsilon_after(ledger.most_releases).upper <= 1


def test_large_caps_cost_nothing_and_small_ones_are_refused():
    roomy = PrivacyPlan(**SETTINGS, **{**ROOM, "batch_cap": 1300})
    assert roomy.epsilon().upper == pytest.approx(PrivacyPlan(**SETTINGS).epsilon().upper, rel=1e-6)
    unlimited = PrivacyPlan(**SETTINGS, **{**ROOM, "batch_cap": 100_000})
    assert unlimited.cut_probability == 0
    assert unlimited.epsilon() == PrivacyPlan(**SETTINGS).epsilon()
    with pytest.raises(ValueError, match=r"batch_cap is 1100.*1\.2 times"):
        PrivacyPlan(**SETTINGS, **{**ROOM, "batch_cap": 1100})


def test_far_more_steps_than_planned_lose_the_guarantee_instead_of_the_charge():
    plan = PrivacyPlan(**SETTINGS, **ROOM)
    assert math.isfinite(plan.epsilon().upper)
    assert math.isinf(plan.epsilon_after(100_000).upper)


@pytest.mark.parametrize("engine", [PldEngine(), RdpEngine(), PrvEngine()])
def test_only_the_engine_that_charges_cuts_answers(engine):
    with pytest.raises(EngineError, match="certified engine"):
        PrivacyPlan(**SETTINGS, **ROOM).epsilon(engine=engine)


def test_full_batch_is_the_gaussian_without_sampling():
    values = {**SETTINGS, "sampling_probability": 1, "steps": 10, "noise_multiplier": 20.0}
    full = PrivacyPlan(**values, sampling="full_batch")
    assert full.epsilon() == PrivacyPlan(**values).epsilon()
    twice = PrivacyPlan(**values, sampling="full_batch", relation="replace")
    halved = PrivacyPlan(**{**values, "noise_multiplier": 10.0})
    assert twice.epsilon().upper == pytest.approx(halved.epsilon().upper, rel=1e-9)
    assert "full batch" in full.statement()
    assert "sampler" not in full.statement()


def test_calibration_keeps_its_target_for_every_law():
    rest = {"target_epsilon": 2.0, "delta": 1e-5, "steps": 1000}
    cut = PrivacyPlan.calibrate(**rest, sampling_probability=0.01, **ROOM)
    plain = PrivacyPlan.calibrate(**rest, sampling_probability=0.01)
    assert cut.epsilon().upper <= 2.0
    assert cut.noise_multiplier > plain.noise_multiplier
    full = PrivacyPlan.calibrate(**rest, sampling_probability=1, sampling="full_batch")
    assert 1.99 < full.epsilon().upper <= 2.0


def test_statement_and_sums_name_the_cap():
    cut = PrivacyPlan(**SETTINGS, **ROOM, unit="document")
    for text in (cut.statement(), Phases(plans=[cut, cut]).statement()):
        assert "more than 1,200" in text
        assert "100,000 documents" in text
        assert "charged to δ" in text
    two = Phases(plans=[cut, PrivacyPlan(**SETTINGS, unit="document")])
    assert two.epsilon().upper > PrivacyPlan(**SETTINGS).epsilon_after(2000).upper


def test_plans_without_a_cap_keep_the_digest_that_ledgers_hold():
    digest = "a4f6f86ef44383879f8566af7dc975498a1b0abf069f9c31b7c6854ef7937664"
    assert PrivacyPlan(**SETTINGS).digest == digest
    cut = PrivacyPlan(**SETTINGS, **ROOM)
    assert PrivacyPlan.from_json(cut.to_json()) == cut
    assert cut.digest != digest


def test_ledger_of_another_cap_is_refused_by_name(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, PrivacyPlan(**SETTINGS)).close()
    with pytest.raises(LedgerError, match="batch_cap None there and 1200 here"):
        Ledger.open(path, plan=PrivacyPlan(**SETTINGS, **ROOM))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "full_batch"}, "sampling_probability is 0.01; with sampling='full_batch'"),
        ({"batch_cap": 5}, "batch_cap is 5, but sampling is 'poisson'"),
        ({"most_records": 5}, "most_records is 5, but sampling is 'poisson'"),
        ({**ROOM, "batch_cap": None}, "batch_cap is None"),
        ({**ROOM, "batch_cap": 0}, "batch_cap is 0"),
        ({**ROOM, "most_records": 1e5}, r"most_records is 100000\.0"),
        ({**ROOM, "most_records": True}, "most_records is True"),
        ({"sampling": "fixed_size"}, "without_replacement"),
        ({"sampling": "shuffle"}, "must not be counted so"),
    ],
)
def test_laws_that_do_not_fit_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan(**{**SETTINGS, **change})


def test_commands_take_the_law(capsys):
    room = ["--sampling", "truncated_poisson", "--batch-cap", "1200", "--most-records", "100000"]
    law = ["--sampling-probability", "0.01", "--steps", "1000", "--delta", "1e-5", *room, "--json"]
    assert main(["epsilon", "--noise-multiplier", "1", *law]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["epsilon"] == PrivacyPlan(**SETTINGS, **ROOM).epsilon().upper
    assert report["sampling"] == "truncated_poisson"
    assert main(["noise", "--target-epsilon", "2", *law]) == 0
    noise = json.loads(capsys.readouterr().out)["noise_multiplier"]
    assert (
        noise
        == PrivacyPlan.calibrate(
            target_epsilon=2.0, delta=1e-5, sampling_probability=0.01, steps=1000, **ROOM
        ).noise_multiplier
    )
