"""Crashes: the model survives, the ledger is never short, neither batches nor noise come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from veilspan.accounting import Ledger
from veilspan.core.sampling import poisson_draw
from veilspan.trainer.checkpoint import read_progress
from veilspan.trainer.loop import key_path, train
from veilspan.trainer.recipe import load_recipe
from veilspan.trainer.run_folder import ledger_head
from veilspan.trainer.secrets import key_of_start

STEPS = 8
CRASHES: Mapping[str, list[str]] = {
    "before_ledger": ["before_ledger@3"],
    "after_ledger": ["after_ledger@3"],
    "after_optimizer": ["after_optimizer@3"],
    "during_save": ["during_save@4"],
    "twice": ["after_ledger@3", "during_save@4"],
    "copies": ["after_optimizer@3"],
}
ASKED = {"asked": ["asked@4"]}


@dataclass(frozen=True)
class Survivor:
    """A run that crashed and was finished, and what its first process noted."""

    folder: Path
    log: list[dict]

    def steps_of(self, moment: str) -> list[int]:
        return [entry["step"] for entry in self.log if entry["moment"] == moment]

    def draws_of_starts(self) -> list[dict[int, list[int]]]:
        starts: list[dict[int, list[int]]] = []
        for entry in (entry for entry in self.log if entry["moment"] == "draw"):
            if not starts or entry["step"] <= max(starts[-1]):
                starts.append({})
            starts[-1][entry["step"]] = entry["records"]
        return starts

    def ledger(self) -> Ledger:
        return Ledger.open(self.folder / "ledger.jsonl", read_only=True)


@pytest.fixture(scope="module")
def survivors(
    tmp_path_factory: pytest.TempPathFactory, run_workers: Callable, recipe_in: Callable
) -> dict[str, Survivor]:
    """Runs on two processes, one for each crash plan: all but "copies" share each sequence."""
    root = tmp_path_factory.mktemp("crashes")
    scenarios = []
    for name, crashes in {**CRASHES, **ASKED}.items():
        recipe = recipe_in(
            root / name,
            **({"parallel__replicate": 2} if name == "copies" else {"parallel__context": 2}),
            run__heldout_every=100,
            run__checkpoint_every=2,
            privacy__steps=STEPS,
        )
        path = root / f"{name}.toml"
        path.write_text(recipe.to_toml())
        log = str(root / f"{name}.jsonl")
        scenarios.append({"name": name, "recipe": str(path), "crashes": crashes, "log": log})
    plans = root / "scenarios.json"
    plans.write_text(json.dumps(scenarios))
    run_workers("crash_and_restart.py", plans)
    return {
        scenario["name"]: Survivor(
            folder=load_recipe(scenario["recipe"]).run.folder,
            log=[json.loads(line) for line in Path(scenario["log"]).read_text().splitlines()],
        )
        for scenario in scenarios
    }


@pytest.fixture(params=list(CRASHES))
def survivor(survivors: dict[str, Survivor], request: pytest.FixtureRequest) -> Survivor:
    return survivors[request.param]


@pytest.mark.distributed
def test_the_run_ends_with_a_model_that_loads_and_equals_its_last_checkpoint(
    survivor: Survivor,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(survivor.folder / "model")
    newest = max((survivor.folder / "checkpoints").iterdir())
    shards = [load_file(path) for path in sorted(newest.glob("*.safetensors"))]
    for name, tensor in model.named_parameters():
        whole = torch.cat([shard[f"model.{name}"] for shard in shards if f"model.{name}" in shard])
        assert torch.equal(tensor, whole), name


@pytest.mark.distributed
def test_pitfall_46_every_release_that_could_have_had_noise_is_in_the_ledger(
    survivor: Survivor,
) -> None:
    passed = survivor.steps_of("after_ledger")  # noise is drawn after this moment only
    with survivor.ledger() as ledger:
        recorded = [entry.step for entry in ledger.entries]
    assert all(recorded.count(step) >= passed.count(step) for step in set(passed))
    assert set(recorded) <= set(survivor.steps_of("before_ledger"))


@pytest.mark.distributed
def test_lost_work_is_paid_for_and_the_budget_still_holds(survivor: Survivor) -> None:
    with survivor.ledger() as ledger:
        assert ledger.budget_epsilon is not None
        assert ledger.spent().upper <= ledger.budget_epsilon
        assert ledger.releases == STEPS == ledger.most_releases
        finished = read_progress(max((survivor.folder / "checkpoints").iterdir())).step
        repeated = ledger.releases - len({entry.step for entry in ledger.entries})
    assert finished == STEPS - repeated
    assert repeated >= 1


@pytest.mark.distributed
def test_pitfall_43_every_start_draws_by_a_key_of_its_own_that_its_ledger_decides(
    survivor: Survivor,
) -> None:
    key = key_path(load_recipe(survivor.folder / "recipe.toml")).read_bytes()
    ledger = survivor.folder / "ledger.jsonl"
    keys = [key_of_start(key, ledger_head(ledger, count)) for count in range(STEPS + 1)]

    def made(count: int, draws: dict[int, list[int]]) -> bool:
        made_again = {s: poisson_draw(24, 4 / 24, s, keys[count]).records.tolist() for s in draws}
        return made_again == draws

    count = -1  # releases before the start: every start comes after more of them
    for number, draws in enumerate(survivor.draws_of_starts()):
        count = next(more for more in range(count + 1, STEPS + 1) if made(more, draws))
        assert number > 0 or count == 0
    assert count > 0


@pytest.mark.distributed
def test_pitfall_44_a_checkpoint_holds_whole_steps_and_remembers_the_ledger(
    survivor: Survivor,
) -> None:
    with survivor.ledger() as ledger:
        for folder in (survivor.folder / "checkpoints").iterdir():
            progress = read_progress(folder)
            counted = ledger.entries[: progress.ledger_length]
            assert progress.step - 1 in {entry.step for entry in counted}
            assert len({entry.step for entry in counted}) >= progress.step


@pytest.mark.distributed
def test_processes_stop_together_where_one_is_asked_and_no_step_is_lost(
    survivors: dict[str, Survivor],
) -> None:
    asked = survivors["asked"]
    assert asked.steps_of("during_save") == [2, 4, 5, 6, 8]
    with asked.ledger() as ledger:
        assert [entry.step for entry in ledger.entries] == list(range(STEPS))


@pytest.mark.distributed
def test_copies_keep_the_micro_batch_that_they_chose(survivors: dict[str, Survivor]) -> None:
    kept = load_recipe(survivors["copies"].folder / "recipe.toml")
    given = load_recipe(survivors["copies"].folder.parent.with_suffix(".toml"))
    size = kept.compute.microbatch_size
    assert size in (1, 2)  # four units a step, on two copies
    assert kept == given.with_microbatch(int(size))


def test_pitfall_43_the_same_steps_with_the_same_units_never_get_the_same_noise(
    tmp_path: Path, recipe_in: Callable
) -> None:
    released = []
    for name in ("first", "second"):
        recipe = recipe_in(
            tmp_path,
            privacy__key_file=str(tmp_path / "shared.key"),
            privacy__steps=1,
            optimizer__warmup_steps=0,
            run__folder=str(tmp_path / name),
        )
        checkpoint = train(recipe) / "checkpoints" / "step-00000001"
        released.append(load_file(next(checkpoint.glob("*.safetensors"))))
    moments = [name for name in released[0] if name.endswith(".exp_avg")]
    assert moments
    for name in moments:  # after one step, a multiple of the released gradient
        assert (released[0][name] != released[1][name]).float().mean() > 0.99, name
