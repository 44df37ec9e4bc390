"""The command line: what `plan` tells, how mistakes end, that `-m` works."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from veilspan.accounting import LedgerError, PrivacyPlan
from veilspan.core import PrivacyError
from veilspan.trainer.cli import USER_ERROR, app
from veilspan.trainer.errors import RecipeError
from veilspan.trainer.interrupts import Interrupted
from veilspan.trainer.recipe import Recipe

RECIPE = """
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2

[data]
train = "{train}"
unit = "record"
sequence_length = 32
tokenizer = "bytes"

[privacy]
target_epsilon = 8.0
delta = 1e-3
expected_batch_size = 5
steps = 10

[run]
folder = "{run}"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return a recipe for fifty small files."""
    train = tmp_path / "train"
    train.mkdir()
    for number in range(50):
        (train / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    file = tmp_path / "recipe.toml"
    text = RECIPE.format(train=train.as_posix(), run=(tmp_path / "run").as_posix())
    file.write_text(text, encoding="utf-8")
    return file


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_plan_prints_the_certified_numbers_and_trains_nothing(recipe: Path, tmp_path: Path):
    result = invoke("plan", recipe, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    expected = PrivacyPlan.calibrate(
        target_epsilon=8.0, delta=1e-3, sampling_probability=0.1, steps=10
    )
    assert told["num_records"] == 50
    assert told["privacy"]["noise_multiplier"] == expected.noise_multiplier
    assert (
        told["privacy"]["lower"] <= told["privacy"]["estimate"] <= told["privacy"]["upper"] <= 8.0
    )
    assert told["privacy"]["expected_batch_size"] == pytest.approx(5.0)
    assert told["model"]["parameters"] > 0
    assert 1 <= told["microbatch"]["size"] <= 5
    memory = told["memory_bytes_per_process"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert 0 < told["seconds"] < math.inf
    assert not (tmp_path / "run").exists()


def test_plan_prints_tables_that_name_every_number(recipe: Path):
    result = invoke("plan", recipe, "--set", "privacy.steps=7", "--set", "data.max_records=40")
    assert result.exit_code == 0, result.output
    for text in ("N = 40", "noise multiplier σ", "at most 8.000", "expected batch", "micro-batch"):
        assert text in result.stdout


def test_a_plan_opens_the_held_out_data(recipe: Path, tmp_path: Path):
    public = tmp_path / "public"
    held = (f"--set=data.heldout={public.as_posix()}", "--set=data.heldout_is_public=true")
    refused = invoke("plan", recipe, *held)
    assert refused.exit_code == USER_ERROR
    assert "data.heldout is" in refused.stderr
    assert "does not exist" in refused.stderr
    public.mkdir()
    (public / "a.txt").write_text("public", encoding="utf-8")
    told = json.loads(invoke("plan", recipe, *held, "--json").stdout)
    assert (told["num_records"], told["num_heldout"]) == (50, 1)
    assert "1 public records" in invoke("plan", recipe, *held).stdout


def test_a_plan_counts_the_sequences_of_a_document_together(recipe: Path):
    several = ("--set=data.unit=document", "--set=data.sequences_per_unit=4")
    one, told = (
        json.loads(invoke("plan", recipe, "--json", *arguments).stdout)
        for arguments in (several[:1], several)
    )
    assert told["num_records"] == one["num_records"] == 50
    assert told["privacy"]["sampling_probability"] == pytest.approx(5 / 200)
    expected = PrivacyPlan.calibrate(
        target_epsilon=8.0,
        delta=1e-3,
        sampling_probability=5 / 200,
        steps=10,
        records_per_unit=4,
    )
    assert told["privacy"]["noise_multiplier"] == expected.noise_multiplier
    assert told["privacy"]["expected_batch_size"] == pytest.approx(5.0)
    tables = invoke("plan", recipe, *several).stdout
    assert "4 sequences of each" in tables
    assert "5 sequences" in tables


def test_an_expected_batch_is_a_constant_of_recipe_and_number_of_units(recipe: Path):
    told = json.loads(
        invoke(
            "plan",
            recipe,
            "--json",
            "--set=privacy.expected_batch_size=",
            "--set=privacy.sampling_probability=0.3",
        ).stdout
    )
    assert told["privacy"]["sampling_probability"] == 0.3
    assert told["privacy"]["expected_batch_size"] == pytest.approx(15.0)


def test_an_automatic_delta_is_below_one_over_the_number_of_units(recipe: Path):
    told = json.loads(invoke("plan", recipe, "--json", "--set=privacy.delta=auto").stdout)
    assert told["privacy"]["delta"] == pytest.approx(50**-1.1)
    assert told["privacy"]["delta"] < 1 / 50


@pytest.mark.parametrize(
    "error",
    [
        RecipeError("wrong [key]"),
        PrivacyError("wrong [key]"),
        LedgerError("wrong [key]"),
        OSError(errno.ENOSPC, "No space left on device", "/wrong [key]"),
        OSError(errno.EFBIG, "File too large", "/wrong [key]"),
    ],
    ids=lambda error: f"{type(error).__name__} {getattr(error, 'errno', '')}".strip(),
)
def test_what_the_user_can_put_right_is_one_message(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(recipe: Recipe) -> Path:
        raise error

    monkeypatch.setattr("veilspan.trainer.loop.train", fail)
    result = invoke("train", recipe)
    assert result.exit_code == USER_ERROR
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("wrong [key]") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        (Interrupted("after [step] 3", signal.SIGTERM), 143, "after [step] 3"),
        (Interrupted("after [step] 3", signal.SIGINT), 130, "after [step] 3"),
        (KeyboardInterrupt(), 130, "Interrupted at once. The same command continues the run"),
    ],
)
def test_a_run_that_was_interrupted_says_how_it_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, status: int, told: str
):
    def interrupted(recipe: Recipe) -> Path:
        raise end

    monkeypatch.setattr("veilspan.trainer.loop.train", interrupted)
    result = invoke("train", recipe)
    assert result.exit_code == status
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_a_mistake_of_ours_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(recipe: Recipe) -> Path:
        raise KeyError("ours")

    monkeypatch.setattr("veilspan.trainer.loop.train", fail)
    assert isinstance(invoke("train", recipe).exception, KeyError)


def test_train_gets_the_recipe_with_overrides(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Recipe] = []
    monkeypatch.setattr("veilspan.trainer.loop.train", seen.append)
    assert invoke("train", recipe, "--set", "run.seed=5").exit_code == 0
    assert [one.run.seed for one in seen] == [5]


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, recipe: Path, command: str):
    for place in (tmp_path, recipe):
        result = invoke(command, place)
        assert result.exit_code == USER_ERROR
        assert f"{place} is no run folder" in result.stderr


def test_the_module_runs_and_ends_with_2_without_a_traceback(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "veilspan.trainer", "plan", str(tmp_path / "none.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == USER_ERROR
    assert done.stderr.strip().splitlines()[-1].startswith("Error: Cannot read the recipe")
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_under_torchrun_one_message_is_printed_and_every_process_ends(tmp_path: Path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "veilspan.trainer"]
    done = subprocess.run(
        [*launch, "train", str(tmp_path / "none.toml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("Error: Cannot read the recipe") == 1
