"""Plans, ledgers, statements and commands carry how norms are estimated."""

import json
from dataclasses import replace

import numpy as np
import pytest

from veilspan.accounting import (
    BudgetExceeded,
    Ledger,
    LedgerError,
    Phases,
    PrivacyPlan,
    SketchedClip,
)
from veilspan.accounting.__main__ import main
from veilspan.accounting.audit import audit_one_run, audit_white_box
from veilspan.accounting.audit.plotting import plot_audit
from veilspan.accounting.audit.whole_runs import WholeRunsAudit
from veilspan.accounting.plotting import epsilon_curve, plot_epsilon

NORMS = SketchedClip(probes=16)
SETTINGS = {"sampling_probability": 0.01, "steps": 200, "delta": 1e-5}
EXACT = PrivacyPlan(noise_multiplier=1.0, **SETTINGS)
PLAN = PrivacyPlan(noise_multiplier=1.0, norms=NORMS, **SETTINGS)
SHARED = PrivacyPlan(
    noise_multiplier=1.0, norms=SketchedClip(probes=16, probes_shared=True), **SETTINGS
)
OPTIONS = [
    *("--sampling-probability", "0.01"),
    *("--steps", "200"),
    *("--delta", "1e-5"),
]


def test_plan_with_exact_norms_is_written_as_before():
    assert "norms" not in EXACT.to_dict()
    assert EXACT.digest == "db84cb54dd624921ac927e9757f041c1054e4d917cfcb6f6d8673428a166b6bb"


def test_plan_with_estimated_norms_survives_json_and_has_a_digest_of_its_own():
    assert PrivacyPlan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.to_dict()["norms"] == {
        "probes": 16,
        "blocks": 1,
        "probes_shared": False,
        "groups": 1,
    }
    assert len({EXACT.digest, PLAN.digest, SHARED.digest}) == 3


@pytest.mark.parametrize(
    "norms",
    [
        {"probes": 16},
        {"probes": 16, "blocks": 3, "probes_shared": False, "groups": 1},
        {"probes": 16, "blocks": 1, "probes_shared": "no", "groups": 1},
        {"probes": 16, "blocks": 1, "probes_shared": False, "groups": 1, "cap": 2},
        "sketch",
        64,
    ],
)
def test_damaged_norms_in_json_are_refused(norms):
    data = {**PLAN.to_dict(), "norms": norms}
    with pytest.raises(ValueError, match=r"norms|blocks|probes_shared"):
        PrivacyPlan.from_dict(data)


def test_every_answer_of_a_plan_counts_the_estimates():
    assert EXACT.epsilon().upper < PLAN.epsilon().lower < SHARED.epsilon().lower
    assert EXACT.delta_at(1.0).upper < PLAN.delta_at(1.0).lower < SHARED.delta_at(1.0).lower
    rates = [plan.tradeoff(12).true_positive_rate(0.01) for plan in (EXACT, PLAN, SHARED)]
    assert rates == sorted(rates)
    assert rates[0] < rates[1] < rates[2]
    assert epsilon_curve(PLAN, 3)[-1][1] > epsilon_curve(EXACT, 3)[-1][1]


def test_calibration_finds_more_noise_and_keeps_the_target():
    found = [
        PrivacyPlan.calibrate(target_epsilon=2.0, norms=norms, **SETTINGS)
        for norms in (None, SketchedClip(probes=64, blocks=4), NORMS, SHARED.norms)
    ]
    noise = [plan.noise_multiplier for plan in found]
    assert noise == sorted(noise)
    assert noise[1] < 1.02 * noise[0]
    assert noise[2] > 1.1 * noise[0]
    for plan in found:
        assert 1.99 < plan.epsilon().upper <= 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation": "replace"}, "add_remove"),
        ({"sampling": "full_batch", "sampling_probability": 1.0}, "exact norms"),
        ({"sampling_probability": 1.0}, "exact norms"),
    ],
)
def test_plans_of_what_is_not_proved_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrivacyPlan(noise_multiplier=1.0, norms=NORMS, **{**SETTINGS, **changes})


def test_samples_that_may_be_cut_are_charged_as_with_exact_norms():
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        norms=NORMS,
        sampling="truncated_poisson",
        batch_cap=1250,
        most_records=100_000,
        **SETTINGS,
    )
    assert PLAN.epsilon().upper < plan.epsilon().upper < 1.1 * PLAN.epsilon().upper


def test_statement_says_that_contributions_may_exceed_the_clip_norm():
    text = PLAN.statement()
    for words in (
        "from 16 Gaussian probes: every record has secret ones of its own in every step",
        "may therefore exceed the clip norm",
        "independent of the data",
        "never used again",
        "that of the law which stands for estimated norms is at least",
    ):
        assert words in text
    assert "has L2 norm at most" not in text
    assert "the exact ε is at least" not in text
    assert "has L2 norm at most" in EXACT.statement()


def test_statement_names_blocks_shared_probes_and_groups():
    norms = SketchedClip(probes=64, blocks=4, probes_shared=True, groups=3)
    text = PrivacyPlan(noise_multiplier=1.0, norms=norms, clip_norm=2.0, **SETTINGS).statement()
    assert "64 Gaussian probes, the largest mean of 4 blocks of 16" in text
    assert "shared by all records of a step" in text
    assert "counts as revealed" in text
    assert "3 groups of equal thresholds, 2/√3" in text
    assert "secret ones of its own" not in text


def test_statement_of_phases_describes_each_law():
    text = Phases(plans=[EXACT, PLAN]).statement()
    assert "has L2 norm at most" in text
    assert "from 16 Gaussian probes" in text
    assert (
        Phases(plans=[EXACT, PLAN]).epsilon().upper > Phases(plans=[EXACT, EXACT]).epsilon().upper
    )


def test_statement_without_enough_probes_promises_nothing():
    bad = PrivacyPlan(
        noise_multiplier=0.3,
        norms=SketchedClip(probes=1),
        sampling_probability=0.1,
        steps=10**5,
        delta=1e-9,
    )
    assert bad.statement().startswith("NO PRIVACY GUARANTEE")


def test_ledger_counts_estimates_and_stops_earlier(tmp_path):
    budget = EXACT.epsilon_after(20).upper * 1.0001
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, PLAN, budget_epsilon=budget) as ledger:
        most = ledger.most_releases
        assert most is not None
        assert most < 20
        for step in range(most):
            ledger.append(step=step)
        with pytest.raises(BudgetExceeded):
            ledger.append(step=99)
        spent = ledger.spent()
    assert spent == PLAN.epsilon_after(ledger.releases)
    with Ledger.open(path, plan=PLAN) as ledger:
        assert ledger.plan.norms == NORMS
        assert ledger.spent() == spent


def test_ledger_of_another_law_is_refused_and_names_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, PLAN).close()
    for other in (EXACT, SHARED):
        with pytest.raises(LedgerError, match="norms"):
            Ledger.open(path, plan=other)


def test_ledger_whose_law_was_made_lighter_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, PLAN).close()
    path.write_text(path.read_text().replace('"probes": 16', '"probes": 64'))
    with pytest.raises(LedgerError, match="altered"):
        Ledger.open(path)


def answer(capsys, *arguments):
    assert main([*arguments, *OPTIONS, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_take_how_norms_are_estimated(capsys):
    noise = ("--noise-multiplier", "1")
    report = answer(capsys, "epsilon", *noise, "--probes", "16")
    assert report["epsilon"] == PLAN.epsilon().upper
    assert report["norms"]["probes"] == 16
    report = answer(capsys, "delta", "--epsilon", "1", *noise, "--probes", "16", "--probes-shared")
    assert report["delta"] == SHARED.delta_at(1.0).upper
    report = answer(capsys, "curve", "--of", "epsilon", "--points", "2", *noise, "--probes", "16")
    assert report["epsilon"][-1] > EXACT.epsilon().upper
    blocks = ("--probes", "64", "--blocks", "4", "--norm-groups", "2")
    report = answer(capsys, "noise", "--target-epsilon", "2", *blocks)
    assert report["norms"] == {"probes": 64, "blocks": 4, "probes_shared": False, "groups": 2}
    assert "norms" not in answer(capsys, "epsilon", *noise)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--blocks", "4"], "--probes"),
        (["--probes-shared"], "--probes"),
        (["--probes", "10", "--blocks", "4"], "divide"),
        (["--probes", "16", "--relation", "replace"], "add_remove"),
        (["--probes", "16", "--engine", "rdp"], "exact norms only"),
        (["--probes", "16", "--engine", "prv"], "exact norms only"),
    ],
)
def test_commands_refuse_what_is_not_counted(capsys, extra, message):
    assert main(["epsilon", "--noise-multiplier", "1", *OPTIONS, *extra]) == 2
    assert message in capsys.readouterr().err


def test_audits_of_whole_runs_go_by_the_law():
    # An attack that finds more than exact norms allow, and less than these estimates do.
    attack = WholeRunsAudit(
        runs=(1000, 1000), confidence=0.95, missed_upper=1 - 0.0024, alarms_upper=0.001
    )
    assert attack.contradicts(EXACT)
    assert not attack.contradicts(PLAN)


def test_audits_that_take_contributions_for_bounded_refuse(capsys, tmp_path):
    rows, plan = tmp_path / "rows.npz", tmp_path / "plan.json"
    plan.write_text(PLAN.to_json())
    noise = np.random.default_rng(0).standard_normal((2, 100))
    np.savez(rows, with_canary=noise[0] + 1, without_canary=noise[1])
    assert main(["audit", str(rows), "--plan", str(plan)]) == 2
    assert "norms are estimated" in capsys.readouterr().err
    members = np.arange(100) % 2 == 0
    with pytest.raises(ValueError, match="plan with estimated norms"):
        audit_one_run(1.0 * members, members, guesses=10, delta=1e-5, family=PLAN)
    audit = audit_white_box(noise[0] + 1, noise[1], noise_multiplier=1.0)
    with pytest.raises(ValueError, match="norms are estimated"):
        plot_audit(PLAN, audit, tmp_path / "audit.svg")


@pytest.mark.parametrize("arguments", [["curve", "--of", "epsilon"], ["curve", "--of", "delta"]])
def test_curves_without_a_guarantee_are_refused(capsys, arguments):
    options = ["--sampling-probability", "0.1", "--steps", "100000", "--delta", "1e-9"]
    law = ["--noise-multiplier", "0.3", "--probes", "1"]
    assert main([*arguments, *options, *law]) == 2
    assert "ε is infinite" in capsys.readouterr().err


def test_picture_without_a_guarantee_is_refused(tmp_path):
    plan = replace(PLAN, norms=SketchedClip(probes=1), noise_multiplier=0.3, steps=10**5)
    with pytest.raises(ValueError, match="ε is infinite"):
        plot_epsilon(plan, tmp_path / "epsilon.svg")
    assert not (tmp_path / "epsilon.svg").exists()


def test_text_says_that_lower_bounds_are_about_the_counted_law(capsys):
    assert main(["epsilon", "--noise-multiplier", "1", *OPTIONS, "--probes", "16"]) == 0
    assert "counted ε is at least" in capsys.readouterr().out
