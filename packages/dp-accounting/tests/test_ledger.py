"""The ledger counts every release, keeps the budget, and belongs to one run and one writer."""

import json
import os
import re
import stat

import pytest

from veilspan.accounting import BudgetExceeded, Ledger, LedgerError, PrivacyPlan

PLAN = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.01, steps=100, delta=1e-5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path, releases=5, **settings):
    with Ledger.create(path, PLAN, **settings) as ledger:
        for step in range(releases):
            ledger.append(step=step)
    return path


def reread(path):
    with Ledger.open(path, read_only=True) as ledger:
        return ledger.releases


def test_releases_survive_reopening_and_epsilon_follows_their_number(path):
    filled(path, 3)
    with Ledger.open(path, plan=PLAN) as ledger:
        ledger.append(step=3)
        ledger.verify()
        assert [entry.step for entry in ledger.entries] == [0, 1, 2, 3]
        assert ledger.spent() == PLAN.epsilon_after(4)
    assert reread(path) == 4


def test_file_is_private_to_its_owner_and_plain_json_lines(path):
    filled(path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    header, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["schema"] == "veilspan.accounting.ledger/1"
    assert header["plan_digest"] == PLAN.digest
    assert [entry["number"] for entry in entries] == [1, 2]


def test_a_ledger_shows_what_it_is_and_whether_it_takes_releases(path):
    filled(path, 2, run_id="warm-up", budget_epsilon=3.0)
    ledger = Ledger.open(path)
    about = f"{str(path)!r}, run_id='warm-up', releases=2, budget_epsilon=3.0"
    assert repr(ledger) == f"<Ledger {about}, open>"
    ledger.close()
    assert repr(ledger) == f"<Ledger {about}, closed>"
    with Ledger.open(path, read_only=True) as reader:
        assert repr(reader) == f"<Ledger {about}, read only>"


def test_two_ledgers_of_one_run_never_begin_alike(tmp_path):
    paths = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    first, second = [filled(path, 1, run_id="same").read_text() for path in paths]
    assert first.splitlines()[0] != second.splitlines()[0]
    assert first.splitlines()[1] != second.splitlines()[1]  # it links to the first line


def test_lines_tell_the_day_only_as_the_time_between_releases_would_tell_the_draw(path):
    filled(path, 1)
    (entry,) = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert set(entry) == {"number", "step", "attempt", "day", "previous"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["day"])


def test_every_append_and_the_creation_reach_the_disk(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), real(fd))
    )
    with Ledger.create(path, PLAN) as ledger:
        assert synced == [False, True]  # the file, then the folder that names it
        ledger.append(step=0)
        assert synced == [False, True, False]


def test_pitfall_46_every_attempt_counts_not_only_finished_steps(path):
    with Ledger.create(path, PLAN) as ledger:
        ledger.append(step=0, attempt=0)
        ledger.append(step=0, attempt=1)
        ledger.append(step=0, attempt=2)
        assert ledger.releases == 3
        assert ledger.next_attempt(0) == 3
        assert ledger.next_attempt(1) == 0


def test_pitfall_43_an_attempt_cannot_be_recorded_twice(path):
    filled(path, 2)
    with Ledger.open(path) as ledger:
        with pytest.raises(LedgerError, match=r"already holds step 1, attempt 0.*Use attempt=1"):
            ledger.append(step=1, attempt=0)
        ledger.append(step=1, attempt=1)


def test_pitfall_43_a_ledger_shorter_than_its_checkpoint_is_a_hard_error(path):
    filled(path, 5)
    with Ledger.open(path) as ledger:
        ledger.require_at_least(5)
        with pytest.raises(LedgerError, match=r"holds 5 releases.*after 6"):
            ledger.require_at_least(6)


def test_budget_stops_the_run_before_anything_is_written(path):
    budget = PLAN.epsilon_after(3).upper * 1.0005
    with Ledger.create(path, PLAN, budget_epsilon=budget) as ledger:
        assert ledger.most_releases == 3
        for step in range(3):
            ledger.append(step=step)
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(BudgetExceeded, match="allows 3 releases"):
                ledger.append(step=3)
        assert path.read_bytes() == before
        assert ledger.spent().upper <= budget
    with Ledger.open(path) as ledger, pytest.raises(BudgetExceeded):
        ledger.append(step=3)


def test_calibrated_plan_can_run_all_its_steps_within_its_target(path):
    plan = PrivacyPlan.calibrate(
        target_epsilon=2.0, delta=1e-6, sampling_probability=0.02, steps=300
    )
    with Ledger.create(path, plan, budget_epsilon=2.0) as ledger:
        assert ledger.most_releases is not None
        assert plan.steps <= ledger.most_releases <= plan.steps * 1.01
        assert plan.epsilon_after(ledger.most_releases + 1).upper > 2.0


def test_budget_of_a_plan_without_noise_allows_nothing(path):
    plan = PrivacyPlan(noise_multiplier=0.0, sampling_probability=0.1, steps=5, delta=1e-5)
    ledger = Ledger.create(path, plan, budget_epsilon=100.0)
    with ledger, pytest.raises(BudgetExceeded, match="ε ≤ infinity"):
        ledger.append(step=0)


def test_budget_of_a_plan_that_releases_nothing_allows_everything(path):
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.0, steps=5, delta=1e-5)
    with Ledger.create(path, plan, budget_epsilon=0.1) as ledger:
        for step in range(10):
            ledger.append(step=step)
        assert ledger.spent().upper == 0.0


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan"), "8"])
def test_senseless_budgets_are_refused(path, budget):
    with pytest.raises(ValueError, match="budget_epsilon is"):
        Ledger.create(path, PLAN, budget_epsilon=budget)
    assert not path.exists()


def test_ledger_of_another_plan_or_run_is_refused_with_the_difference(path):
    filled(path, 1, run_id="one")
    other = PrivacyPlan(noise_multiplier=2.0, sampling_probability=0.01, steps=100, delta=1e-5)
    with pytest.raises(LedgerError, match=r"noise_multiplier 1\.0 there and 2.0 here"):
        Ledger.open(path, plan=other)
    with pytest.raises(LedgerError, match="belongs to run 'one', not to 'two'"):
        Ledger.open(path, run_id="two")
    with Ledger.open(path, plan=PLAN, run_id="one") as ledger:
        assert ledger.run_id == "one"


def test_ledger_is_never_overwritten_and_never_invented(path, tmp_path):
    filled(path, 1)
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, PLAN)
    assert reread(path) == 1
    with pytest.raises(LedgerError, match="does not exist"):
        Ledger.open(tmp_path / "missing.jsonl")
    with pytest.raises(LedgerError, match="could not be created"):
        Ledger.create(tmp_path / "no" / "folder.jsonl", PLAN)
    (tmp_path / "other.json").write_text('{"schema": "something"}\n')
    with pytest.raises(LedgerError, match="not a ledger this version reads"):
        Ledger.open(tmp_path / "other.json")


def test_two_writers_are_refused_and_readers_are_not(path):
    filled(path, 2)
    with Ledger.open(path) as writer:
        with pytest.raises(LedgerError, match="in use by another run"):
            Ledger.open(path)
        with Ledger.open(path, read_only=True) as reader:
            assert reader.releases == 2
            with pytest.raises(LedgerError, match="read_only"):
                reader.append(step=2)
        writer.append(step=2)
    with pytest.raises(LedgerError, match="was closed"):
        writer.append(step=3)


@pytest.mark.parametrize("arguments", [{"step": -1}, {"step": 1.5}, {"step": 0, "attempt": -1}])
def test_senseless_steps_are_refused(path, arguments):
    with Ledger.create(path, PLAN) as ledger:
        with pytest.raises(ValueError, match="whole number"):
            ledger.append(**arguments)
        assert ledger.releases == 0
