"""Size of micro-batches: who decides, what limits it, that nothing private is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from veilspan.accounting import PrivacyPlan
from veilspan.trainer import microbatch
from veilspan.trainer.assembly import Parts, assemble, with_microbatch
from veilspan.trainer.forecast import make_forecast
from veilspan.trainer.loop import train
from veilspan.trainer.microbatch import chosen_microbatch, settled_microbatch
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe

MEMORY = {"parameters": 100, "optimizer": 200, "activations": 60, "logits": 40}
CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALONE = Processes(device=CPU)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make a device have so many bytes free."""
    return lambda size: monkeypatch.setattr(microbatch, "free_bytes", lambda _: size)


def _most(recipe: Recipe, *, expected: float, device: torch.device = CPU) -> int:
    """Return the largest size that the choice would allow."""
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        sampling_probability=0.1,
        steps=1,
        delta=1e-5,
        expected_batch_size=expected,
    )
    return chosen_microbatch(recipe, plan, MEMORY, lambda length, most: most, device).size


def test_a_number_in_the_recipe_is_taken(tmp_path: Path, recipe_in: Callable) -> None:
    settled = settled_microbatch(recipe_in(tmp_path, compute__microbatch_size=3))
    assert settled is not None
    assert settled.size == 3


@pytest.mark.parametrize(
    "settings", [{"parallel__context": 2}, {"compute__backward": "single_sample"}]
)
def test_auto_is_one_where_nothing_else_is_possible(
    tmp_path: Path, recipe_in: Callable, settings: dict[str, Any]
) -> None:
    settled = settled_microbatch(recipe_in(tmp_path, **settings))
    assert settled is not None
    assert settled.size == 1


def test_auto_is_the_default_and_open(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path)
    assert recipe.compute.microbatch_size == "auto"
    assert settled_microbatch(recipe) is None


def test_activations_may_take_a_third_of_what_the_state_leaves_free(
    tmp_path: Path, recipe_in: Callable, free: Callable[[int], None]
) -> None:
    recipe = recipe_in(tmp_path)
    for size, most in [(0, 1), (299, 1), (1200, 3), (3300, 10)]:
        free(size)
        assert _most(recipe, expected=1000) == most


def test_a_micro_batch_is_never_larger_than_a_copy_expects(
    tmp_path: Path, recipe_in: Callable, free: Callable[[int], None]
) -> None:
    free(10**9)
    assert _most(recipe_in(tmp_path), expected=20.5) == 21
    assert _most(recipe_in(tmp_path), expected=0.1) == 1
    assert _most(recipe_in(tmp_path, parallel__replicate=2), expected=20.5) == 11


def test_processes_share_the_memory_of_a_machine_but_not_of_a_gpu(
    tmp_path: Path, recipe_in: Callable, free: Callable[[int], None]
) -> None:
    free(3300)
    recipe = recipe_in(tmp_path, parallel__replicate=2)
    assert _most(recipe, expected=1000) == 4
    assert _most(recipe, expected=1000, device=GPU) == 10


def test_every_process_takes_the_smallest_size(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, compute__microbatch_size=4)
    parts = assemble(recipe, ALONE)
    monkeypatch.setattr(Processes, "largest", lambda _, value: max(value, -2.0))
    settled = with_microbatch(parts, ALONE)
    assert settled.microbatch.size == settled.recipe.compute.microbatch_size == 2


def _parts(recipe: Recipe) -> Parts:
    return with_microbatch(assemble(recipe, ALONE), ALONE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data__sequence_length": 2048},
        {"data__sequence_length": 16, "privacy__groups": "layer"},
        {"data__sequence_length": 16, "privacy__groups": "block"},
        {"model__lora": {"rank": 2}},
        {"compute__norms": "gram", "compute__checkpointing": "full"},
    ],
)
def test_plan_foretells_what_a_run_chooses(
    tmp_path: Path, recipe_in: Callable, settings: dict[str, Any]
) -> None:
    recipe = recipe_in(tmp_path, **settings)
    assert make_forecast(recipe).microbatch.size == _parts(recipe).microbatch.size


def test_short_units_share_a_micro_batch_and_long_ones_do_not(
    tmp_path: Path, recipe_in: Callable
) -> None:
    short = _parts(recipe_in(tmp_path, data__sequence_length=16))
    assert short.microbatch.size > 1
    config = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4}
    config |= {"intermediate_size": 512, "num_hidden_layers": 2}
    long = _parts(recipe_in(tmp_path, data__sequence_length=8192, model__config=config))
    assert long.microbatch.size == 1


def test_pitfall_50_the_choice_does_not_depend_on_what_units_hold(
    tmp_path: Path, recipe_in: Callable, free: Callable[[int], None]
) -> None:
    free(10**8)
    recipe = recipe_in(tmp_path)
    before = _parts(recipe).microbatch
    for file in (tmp_path / "texts").iterdir():
        file.write_text("x" if "7" in file.name else "something else " * 300)
    assert _parts(recipe).microbatch == before


def test_the_model_is_left_as_it_was(tmp_path: Path, recipe_in: Callable) -> None:
    parts = assemble(recipe_in(tmp_path), ALONE)
    with_microbatch(parts, ALONE)
    assert not any("forward" in vars(module) for module in parts.model.modules())


def test_the_choice_is_printed_and_recorded(finished_run: Recipe, finished_output: str) -> None:
    folder = finished_run.run.folder
    size = _parts(finished_run).microbatch.size
    assert f"micro-batch  {size} at a time (chosen by the cost model; " in finished_output
    assert f"\nmicrobatch_size = {size}\n" in (folder / "recipe.toml").read_text()
    assert f"microbatch_size = {size}\n" in (folder / "report.html").read_text()


def test_a_run_may_continue_with_another_size(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    releases = (folder / "ledger.jsonl").read_bytes()
    assert train(finished_copy.with_microbatch(3)) == folder
    assert (folder / "ledger.jsonl").read_bytes() == releases


def test_a_choice_says_why(tmp_path: Path, recipe_in: Callable, free: Callable[..., None]) -> None:
    free(10**9)
    chosen = _parts(recipe_in(tmp_path, data__sequence_length=16)).microbatch
    assert str(chosen) == "4 at a time (chosen by the cost model; a step expects 4)"
    assert str(replace(chosen, size=2)).startswith("2 at a time")
