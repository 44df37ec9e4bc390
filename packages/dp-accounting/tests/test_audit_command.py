"""The command `audit` holds a measurement against a plan or a ledger, as text, JSON and picture."""

import json

import numpy as np
import pytest

from veilspan.accounting import Ledger, PrivacyPlan
from veilspan.accounting.__main__ import main
from veilspan.accounting.audit import audit_one_run, audit_white_box

PLAN = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.01, steps=200, delta=1e-5)
WHOLE = PrivacyPlan(noise_multiplier=0.5, sampling_probability=1.0, steps=1, delta=1e-5)


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json(), encoding="utf-8")
    return str(path)


@pytest.fixture
def whole_file(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(WHOLE.to_json(), encoding="utf-8")
    return str(path)


def repetitions(scale=1.0, contribution=1.0):
    noise = scale * np.random.default_rng(0).standard_normal((2, 1000))
    return {"with_canary": noise[0] + contribution, "without_canary": noise[1]}


def one_run(mu, canaries=1000):
    rng = np.random.default_rng(1)
    members = rng.random(canaries) < 0.5
    return {"scores": rng.standard_normal(canaries) + mu * members, "members": members}


def write(path, rows):
    if path.suffix == ".npz":
        np.savez(path, **rows)
    else:
        lists = {name: row.tolist() for name, row in rows.items()}
        path.write_text(json.dumps(lists), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.npz"])
def test_honest_repetitions_are_consistent(capsys, tmp_path, plan_file, name):
    rows = write(tmp_path / name, repetitions())
    assert main(["audit", rows, "--plan", plan_file, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    direct = audit_white_box(**repetitions(), noise_multiplier=1.0)
    assert report["verdict"] == "consistent"
    assert report["contradictions"] == []
    assert report["epsilon_claimed"] == PLAN.epsilon().upper
    expected = direct.epsilon_lower(1e-5, sampling_probability=0.01, steps=200)
    assert report["epsilon_measured"] == pytest.approx(expected)
    assert report["noise_multiplier"] == pytest.approx(direct.noise_multiplier)
    assert report["releases"] == 200


def test_missing_noise_ends_with_one_and_says_why(capsys, tmp_path, plan_file):
    rows = write(tmp_path / "rows.npz", repetitions(scale=0.85))
    assert main(["audit", rows, "--plan", plan_file]) == 1
    text = capsys.readouterr().out
    assert "claimed: ε ≤" in text
    assert "measured: ε ≥" in text
    assert "the noise multiplier is at most 0.8" in text
    assert "verdict: contradicted" in text


def test_canary_that_does_nothing_ends_with_one(capsys, tmp_path, plan_file):
    rows = write(tmp_path / "rows.npz", repetitions(contribution=0.0))
    assert main(["audit", rows, "--plan", plan_file]) == 1
    assert "verdict: inconclusive" in capsys.readouterr().out


def test_no_noise_is_valid_json(capsys, tmp_path, plan_file):
    rows = write(tmp_path / "rows.npz", repetitions(scale=0.0))
    assert main(["audit", rows, "--plan", plan_file, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["mu_lower"] == "inf"
    assert report["epsilon_measured"] > report["epsilon_claimed"]


@pytest.mark.parametrize(("mu", "status"), [(2.0, 0), (20.0, 1)])
@pytest.mark.parametrize("family", ["any", "gaussian", "plan"])
def test_one_run_is_held_against_the_claim(capsys, tmp_path, whole_file, mu, status, family):
    rows = write(tmp_path / "rows.npz", one_run(mu))
    arguments = ["audit", rows, "--plan", whole_file, "--guesses", "800", "--family", family]
    assert main([*arguments, "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    claim = WHOLE if family == "plan" else family
    direct = audit_one_run(**one_run(mu), guesses=800, delta=1e-5, family=claim)
    assert report["epsilon_measured"] == direct.epsilon_lower > 0.5
    assert report["right"] == direct.right
    assert (report["verdict"] == "contradicted") == bool(status) == bool(report["contradictions"])


def test_measured_epsilon_above_the_claim_ends_with_one(capsys, tmp_path, plan_file):
    rows = write(tmp_path / "rows.json", one_run(20.0))
    arguments = ["audit", rows, "--plan", plan_file, "--guesses", "100,500,1000"]
    assert main([*arguments, "--confidence", "0.9"]) == 1
    text = capsys.readouterr().out
    assert "the measured ε is above the claimed one" in text
    assert "with confidence 0.9" in text
    assert "trade-off curve allows" in text


def test_claim_of_a_ledger_is_what_it_has_released(capsys, tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, PLAN) as ledger:
        for step in range(3):
            ledger.append(step=step)
    rows = write(tmp_path / "rows.npz", repetitions())
    assert main(["audit", rows, "--ledger", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["releases"] == 3
    assert report["epsilon_claimed"] == PLAN.epsilon_after(3).upper
    assert report["epsilon_measured"] < report["epsilon_claimed"]


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("rows", [repetitions(), one_run(2.0)])
def test_plot_writes_a_picture(capsys, tmp_path, whole_file, ending, rows):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"audit.{ending}"
    arguments = ["audit", write(tmp_path / "rows.npz", rows), "--plan", whole_file]
    guesses = ["--guesses", "500"] if "scores" in rows else []
    main([*arguments, *guesses, "--plot", str(path)])
    assert f"wrote {path}" in capsys.readouterr().out
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (repetitions(), ["--guesses", "10"], "--guesses is for audits of one run"),
        (repetitions(), ["--family", "any"], "--family is for audits of one run"),
        (one_run(1.0), [], "--guesses is missing"),
        (one_run(1.0), ["--guesses", "10", "--family", "gaussian"], "use --family plan"),
        (one_run(1.0), ["--guesses", "1001"], "guesses is 1001"),
        (one_run(1.0), ["--guesses", "10", "--confidence", "2"], "confidence is 2.0"),
        ({"scores": np.zeros(3)}, [], "holds ['scores']; it must hold"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_two(
    capsys, tmp_path, plan_file, rows, arguments, message
):
    path = write(tmp_path / "rows.json", rows)
    assert main(["audit", path, "--plan", plan_file, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"scores", "is not JSON"),
        ("rows.json", b"[1, 2]", "holds list; it must hold"),
        ("rows.npz", b"scores", "is not JSON, or not a .npz file"),
        ("rows.npz", b"", "is not JSON, or not a .npz file"),
        ("rows.npz", b"PK\x03\x04torn", "is not JSON, or not a .npz file"),
        ("rows.json", b"\xff\xfe", "is not JSON"),
    ],
)
def test_unreadable_files_are_named(capsys, tmp_path, plan_file, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["audit", str(path), "--plan", plan_file]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path} " in error
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json"], "--plan --ledger"),
        (["a.json", "--plan", "p", "--ledger", "l"], "not allowed with"),
        (["a.json", "--plan", "p", "--guesses", "some"], "'some' is not a list"),
    ],
)
def test_unreadable_arguments_are_one_clear_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["audit", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
