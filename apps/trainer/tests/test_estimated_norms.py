"""Norms estimated from probes: the plan counts what the step does, from recipe to ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from veilspan.accounting import Ledger, LedgerError, PrivacyPlan, SketchedClip
from veilspan.core import NormLaw, Release, Sketch
from veilspan.trainer import make_private
from veilspan.trainer.budget import plan_of, privacy_plan
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.forecast import make_forecast
from veilspan.trainer.loop import train
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.releases import ReleaseGate, Unobserved
from veilspan.trainer.run_folder import RunFolder, recipe_digest

LAW = SketchedClip(probes=16, blocks=4)
ESTIMATED = {"privacy__norm_probes": 16, "privacy__norm_blocks": 4}


def test_a_run_with_estimated_norms_keeps_its_budget_and_says_how(
    tmp_path: Path, recipe_in: Callable[..., Recipe]
) -> None:
    recipe = recipe_in(tmp_path, **ESTIMATED, privacy__steps=4)
    folder = RunFolder(train(recipe))
    with folder.read_ledger() as ledger:
        assert ledger.plan.norms == LAW
        assert ledger.releases == 4
        assert 7.9 < ledger.spent().upper <= 8.0
        exact = replace(ledger.plan, norms=None).epsilon().upper
        assert exact < 7.999  # the noise is larger than exact norms would need
    assert "16" in folder.statement.read_text()
    train(recipe_in(tmp_path, **ESTIMATED, privacy__steps=4))  # nothing is left to do


def test_a_run_continues_under_its_own_law_only(
    tmp_path: Path, recipe_in: Callable[..., Recipe]
) -> None:
    train(recipe_in(tmp_path, **ESTIMATED, privacy__steps=2))
    with pytest.raises(TrainerError, match="another recipe"):
        train(recipe_in(tmp_path, privacy__norm_probes=32, privacy__steps=2))
    with pytest.raises(TrainerError, match="another recipe"):
        train(recipe_in(tmp_path, privacy__steps=2))


def test_exact_norms_keep_the_digests_of_earlier_versions(
    tmp_path: Path, recipe_in: Callable[..., Recipe]
) -> None:
    recipe = recipe_in(tmp_path)
    assert recipe_digest(recipe) == recipe_digest(recipe_in(tmp_path, privacy__norm_blocks=2))
    assert recipe_digest(recipe) != recipe_digest(recipe_in(tmp_path, **ESTIMATED))


def test_the_forecast_counts_the_law(tmp_path: Path, recipe_in: Callable[..., Recipe]) -> None:
    forecast = make_forecast(recipe_in(tmp_path, **ESTIMATED))
    assert forecast.plan.norms == LAW
    exact = privacy_plan(recipe_in(tmp_path), forecast.num_records)
    assert forecast.plan.noise_multiplier > exact.noise_multiplier


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"privacy__norm_blocks": 3}, "norm_blocks"),
        ({"privacy__norm_probes": 0}, "norm_probes"),
        ({"privacy__groups": "layer"}, "privacy.groups"),
        ({"compute__norms": "gram"}, "compute.norms"),
        ({"compute__backward": "per_sample"}, "compute.backward"),
        ({"parallel__context": 2, "privacy__sums": "exact"}, "privacy.sums"),
    ],
)
def test_what_estimates_do_not_go_with_is_refused(
    tmp_path: Path, recipe_in: Callable[..., Recipe], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(TrainerError, match=named):
        recipe_in(tmp_path, **(ESTIMATED | changes))


@pytest.mark.parametrize("norms", [LAW, None])
def test_a_certain_batch_has_no_certified_estimates(
    tmp_path: Path, recipe_in: Callable[..., Recipe], norms: SketchedClip | None
) -> None:
    privacy = recipe_in(
        tmp_path, privacy__expected_batch_size=None, privacy__sampling_probability=1.0
    ).privacy
    if norms is None:
        assert plan_of(privacy, 24, unit="record", norms=None).sampling_probability == 1
    else:
        with pytest.raises(TrainerError, match="sampling probability is 1"):
            plan_of(privacy, 24, unit="record", norms=norms)


# The gate


def release(**changes: Any) -> Release:
    numbers: dict[str, Any] = {
        "step": 0,
        "noise_multiplier": 1.0,
        "sensitivity": 1.0,
        "expected_batch_size": 4.0,
        "gradient_noise_multiplier": 1.0,
    }
    return Release(**(numbers | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"norms": NormLaw(probes=16, blocks=4, probes_shared=False, groups=1)}, None),
        ({"norms": NormLaw(probes=8, blocks=4, probes_shared=False, groups=1)}, "takes norms by"),
        ({"norms": NormLaw(probes=16, blocks=4, probes_shared=True, groups=1)}, "takes norms by"),
        ({"noise_multiplier": 0.9}, "adds noise"),
        ({"noise_multiplier": 1.1}, None),
    ],
)
def test_pitfall_57_no_release_passes_that_the_plan_does_not_count(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    plan = PrivacyPlan(
        noise_multiplier=1.0, sampling_probability=0.1, steps=3, delta=1e-5, norms=LAW
    )
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        gate = ReleaseGate(ledger, Processes(device=torch.device("cpu")), Unobserved())
        if message is None:
            gate(release(**changes))
            assert ledger.releases == 1
        else:
            with pytest.raises(LedgerError, match=message):
                gate(release(**changes))
            assert ledger.releases == 0


# A loop of one's own


def test_make_private_counts_the_law_of_its_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = [{"x": torch.randn(24)} for _ in range(60)]
    arguments: dict[str, Any] = {
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "steps": 3,
        "expected_batch_size": 10,
    }
    private = make_private(
        model,
        optimizer,
        dataset,
        **arguments,
        ledger=tmp_path / "ledger.jsonl",
        norms=Sketch(probes=16, blocks=4),
        backward="two_pass",
    )
    for batch in private.batches():
        with batch:
            for records in batch.microbatches():
                private.backward(model(records["x"]).square().sum(1))
        optimizer.step()
        optimizer.zero_grad()
    assert private.plan.norms == LAW
    assert 7.9 < private.epsilon().upper <= 8.0
    private.close()
