"""Plans, ledgers, statements and commands carry how many records a unit may hold."""

import json
from dataclasses import replace

import pytest

from veilspan.accounting import Ledger, LedgerError, Phases, PrivacyPlan, SketchedClip
from veilspan.accounting.__main__ import main
from veilspan.accounting.audit import audit_one_run
from veilspan.accounting.audit.whole_runs import WholeRunsAudit

SETTINGS = {"sampling_probability": 0.01, "steps": 200, "delta": 1e-5}
SINGLE = PrivacyPlan(noise_multiplier=1.0, **SETTINGS)
PLAN = PrivacyPlan(noise_multiplier=1.0, unit="user", records_per_unit=5, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records_per_unit": 0}, "at least 1"),
        ({"records_per_unit": True}, "at least 1"),
        ({"records_per_unit": 2.0}, "at least 1"),
        ({"records_per_unit": None}, "at least 1"),
        ({"records_per_unit": 10**7}, "at most 1000000"),
        ({"relation": "replace"}, "add_remove"),
        ({"norms": SketchedClip(probes=64)}, "exact norms"),
    ],
)
def test_what_is_not_counted_is_refused(changes, message):
    fields = {"noise_multiplier": 1.0, "records_per_unit": 5, **SETTINGS, **changes}
    with pytest.raises(ValueError, match=f"records_per_unit.*{message}"):
        PrivacyPlan(**fields)


def test_plan_survives_json_and_old_digests_stay():
    assert "records_per_unit" not in SINGLE.to_dict()
    assert SINGLE.digest == "db84cb54dd624921ac927e9757f041c1054e4d917cfcb6f6d8673428a166b6bb"
    assert PLAN.to_dict()["records_per_unit"] == 5
    assert PrivacyPlan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.digest != replace(PLAN, records_per_unit=4).digest
    with pytest.raises(ValueError, match="records_per_unit"):
        PrivacyPlan.from_dict({**PLAN.to_dict(), "records_per_unit": "5"})


def test_every_answer_of_a_plan_counts_the_records():
    assert SINGLE.epsilon().upper < PLAN.epsilon().lower
    assert SINGLE.delta_at(1.0).upper < PLAN.delta_at(1.0).lower
    rates = [plan.tradeoff(12).true_positive_rate(0.01) for plan in (SINGLE, PLAN)]
    assert rates[0] < rates[1]
    found = PrivacyPlan.calibrate(target_epsilon=2.0, records_per_unit=5, unit="user", **SETTINGS)
    assert found.records_per_unit == 5
    assert 1.99 < found.epsilon().upper <= 2.0
    assert (
        found.noise_multiplier
        > PrivacyPlan.calibrate(target_epsilon=2.0, **SETTINGS).noise_multiplier
    )


def test_samples_that_may_be_cut_are_charged_on_top():
    cut = replace(PLAN, sampling="truncated_poisson", batch_cap=1250, most_records=100_000)
    assert PLAN.epsilon().upper < cut.epsilon().upper < 1.1 * PLAN.epsilon().upper
    assert "never more than 100,000 records" in cut.statement()


def test_ledger_keeps_the_number_of_records(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, PLAN, budget_epsilon=5.0) as ledger:
        ledger.append(step=0)
        assert ledger.spent().upper == PLAN.epsilon_after(1).upper
    with pytest.raises(LedgerError, match="records_per_unit 5 there"):
        Ledger.open(path, plan=replace(PLAN, records_per_unit=1))


def test_statement_says_what_a_unit_holds_and_that_nobody_checks():
    text = PLAN.statement()
    for words in (
        "Each user holds at most 5 records; each record is drawn and clipped by itself.",
        "Nobody checks the number here: bound contributions when the data set is made.",
        "Every record enters the batch of each step independently with probability 0.01",
        "The contribution of each record to a step's sum",
        "The unit of privacy is one user with all of its records.",
    ):
        assert words in text
    assert "group of size k" not in text
    assert "group of size k" in SINGLE.statement()
    whole = replace(PLAN, sampling="full_batch", sampling_probability=1.0, noise_multiplier=50.0)
    assert "Every record is in every step" in whole.statement()
    mixed = Phases(plans=[replace(PLAN, records_per_unit=1), PLAN]).statement()
    assert mixed.count("The unit of privacy is") == 1
    assert "group of size k" not in mixed


def test_commands_take_the_number_of_records(capsys):
    options = ["--sampling-probability", "0.01", "--steps", "200", "--delta", "1e-5", "--json"]
    answers = []
    for number in ("1", "5"):
        assert main(
            ["epsilon", "--noise-multiplier", "1", "--records-per-unit", number, *options]
        ) in (0,)
        answers.append(json.loads(capsys.readouterr().out))
    assert "records_per_unit" not in answers[0]
    assert answers[1]["records_per_unit"] == 5
    assert answers[1]["epsilon"] == pytest.approx(PLAN.epsilon().upper)
    assert main(["noise", "--target-epsilon", "2", "--records-per-unit", "0", *options]) == 2
    assert "records_per_unit is 0" in capsys.readouterr().err


def test_audits_hold_measurements_against_units_of_several_records():
    measured = WholeRunsAudit(runs=(9, 9), confidence=0.95, missed_upper=0.2, alarms_upper=0.08)
    assert measured.contradicts(SINGLE)
    assert not measured.contradicts(replace(PLAN, records_per_unit=20))
    scores = [float(i) for i in range(60)]
    audit = audit_one_run(scores, [i >= 30 for i in range(60)], guesses=40, delta=1e-5)
    assert audit.contradicts(SINGLE)
    assert not audit.contradicts(replace(PLAN, records_per_unit=20))


def test_four_times_the_records_cost_little_noise_where_few_of_a_unit_meet():
    """The figures of the guide on budgets."""
    one, four = (
        PrivacyPlan.calibrate(
            target_epsilon=8.0,
            delta=1e-7,
            sampling_probability=1024 / (each * 100_000),
            steps=2000,
            records_per_unit=each,
        )
        for each in (1, 4)
    )
    assert (round(one.noise_multiplier, 3), round(four.noise_multiplier, 3)) == (0.708, 0.746)
    assert four.noise_multiplier < 1.06 * one.noise_multiplier
    assert four.epsilon().upper <= 8.0
