"""The command line answers, as text and as JSON, and says what is wrong in one line."""

import json
import math
import subprocess
import sys

import pytest

from veilspan.accounting import Ledger, PrivacyPlan
from veilspan.accounting.__main__ import main

SAMPLING = ["--sampling-probability", "0.001", "--steps", "1000", "--delta", "1e-6"]
EPSILON = ["epsilon", "--noise-multiplier", "0.8", *SAMPLING]


def answer(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_module_runs_as_a_process():
    command = [sys.executable, "-m", "veilspan.accounting", *EPSILON, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(done.stdout)
    assert report["epsilon_lower"] <= report["epsilon"] <= report["epsilon_upper"]
    bad = subprocess.run(command[:-3], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "--delta" in bad.stderr


def test_epsilon_reports_the_upper_bound(capsys):
    report = answer(capsys, *EPSILON)
    assert report["epsilon"] == report["epsilon_upper"]
    assert report["epsilon_lower"] <= report["epsilon_estimate"] <= report["epsilon_upper"]
    assert 0.46 < report["epsilon"] < 0.47
    assert main(EPSILON) == 0
    assert "ε ≤ 0.46" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["certified", "pld", "prv", "rdp"])
def test_every_engine_can_be_asked(capsys, engine):
    arguments = ["--sampling-probability", "1/50", "--steps", "500", "--delta", "1e-6"]
    report = answer(capsys, "epsilon", "--noise-multiplier", "1", *arguments, "--engine", engine)
    assert report["epsilon_lower"] <= 3.2137
    assert report["epsilon_upper"] >= 3.2134


def test_no_noise_is_infinite_and_still_valid_json(capsys):
    report = answer(capsys, "epsilon", "--noise-multiplier", "0", *SAMPLING)
    assert math.isinf(float(report["epsilon"]))


def test_noise_answers_with_what_epsilon_confirms(capsys):
    noise = answer(capsys, "noise", "--target-epsilon", "2", *SAMPLING)["noise_multiplier"]
    epsilon = answer(capsys, "epsilon", "--noise-multiplier", repr(noise), *SAMPLING)
    assert 1.99 < epsilon["epsilon"] <= 2


def test_ledger_reports_what_was_spent(capsys, tmp_path):
    plan = PrivacyPlan(noise_multiplier=1.0, sampling_probability=0.01, steps=50, delta=1e-5)
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plan, budget_epsilon=1.0, run_id="a run") as ledger:
        ledger.append(step=0)
        ledger.append(step=1)
    report = answer(capsys, "ledger", str(path))
    assert report["releases"] == 2
    assert report["torn_lines"] == 0
    assert report["epsilon"] == plan.epsilon_after(2).upper
    assert PrivacyPlan.from_dict(report["plan"]) == plan
    assert main(["ledger", str(path)]) == 0
    text = capsys.readouterr().out
    assert "a run: 2 releases" in text
    assert "budget ε = 1" in text


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_writes_a_picture(capsys, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"epsilon.{ending}"
    arguments = ["--noise-multiplier", "1", *SAMPLING, "--budget-epsilon", "1"]
    assert answer(capsys, "plot", *arguments, "--output", str(path)) == {"file": str(path)}
    assert path.stat().st_size > 5000


def test_plot_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = str(tmp_path / "epsilon.png")
    assert main(["plot", "--noise-multiplier", "1", *SAMPLING, "--output", output]) == 2
    assert "pip install 'veilspan-accounting[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epsilon", "--noise-multiplier", "-1", *SAMPLING], "noise_multiplier is -1.0"),
        (["noise", "--target-epsilon", "0", *SAMPLING], "target_epsilon is 0.0"),
        (["ledger", "/does/not/exist"], "/does/not/exist does not exist"),
        (
            ["plot", "--noise-multiplier", "1", *SAMPLING, "--output", "/does/not/exist/a.png"],
            "No such file or directory",
        ),
        (["plot", "--noise-multiplier", "0", *SAMPLING, "--output", "a.png"], "nothing to plot"),
        (["epsilon", "--noise-multiplier", "9", *SAMPLING[:-1], "2"], "delta is 2.0"),
        (
            ["epsilon", "--noise-multiplier", "10", *SAMPLING, "--engine", "prv"],
            "largest_domain",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_two(capsys, arguments, message):
    if arguments[0] == "plot":
        pytest.importorskip("matplotlib")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epsilon", "--noise-multiplier", "much", *SAMPLING], "'much' is not a number"),
        (["epsilon", "--noise-multiplier", "1/0", *SAMPLING], "'1/0' is not a number"),
        (["epsilon", "--noise-multiplier", f"1{'0' * 400}/1", *SAMPLING], "00/1' is not a number"),
        (["guess"], "guess"),
        ([], "COMMAND"),
        (["noise", "--target-epsilon", "1"], "--sampling-probability"),
        (["epsilon", "--noise-multiplier", "1", *SAMPLING, "--engine", "gdp"], "gdp"),
    ],
)
def test_unreadable_arguments_are_one_clear_line_and_exit_code_two(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.err.count("\n") == 1
    assert message in captured.err
