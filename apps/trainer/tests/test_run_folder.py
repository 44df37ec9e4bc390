"""The run folder: complete, one run's only, and its key a secret."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from veilspan.accounting import Ledger, LedgerError, PrivacyPlan
from veilspan.trainer.errors import RecipeError, TrainerError
from veilspan.trainer.files import remove_folder, replace_folder, write_whole
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import (
    RunFolder,
    RunFolderError,
    key_path,
    ledger_head,
    open_run,
    recipe_digest,
)
from veilspan.trainer.run_info import RunInfo, Start, software_versions, used_versions
from veilspan.trainer.secrets import key_fingerprint, load_or_create_key

PLAN = PrivacyPlan(
    noise_multiplier=1.0,
    sampling_probability=0.1,
    steps=20,
    delta=1e-3,
    expected_batch_size=2.4,
)


def _info(recipe: Recipe) -> RunInfo:
    return RunInfo(
        recipe_digest=recipe_digest(recipe),
        key_fingerprint="a" * 16,
        num_records=24,
        num_heldout=3,
        model_type="llama",
        parameters=10,
        trainable=10,
        starts=(Start(releases=0, processes=1, device="CPU", versions=software_versions()),),
    )


def _open(recipe: Recipe, info: RunInfo | None = None) -> RunFolder:
    folder = RunFolder(recipe.run.folder)
    open_run(folder, recipe, PLAN, info or _info(recipe)).close()
    return folder


@pytest.fixture
def recipe(tmp_path: Path, recipe_in: Callable) -> Recipe:
    return recipe_in(tmp_path)


def test_a_new_folder_holds_recipe_ledger_and_facts(recipe: Recipe) -> None:
    folder = _open(recipe)
    assert folder.read_recipe() == recipe
    assert folder.read_info() == _info(recipe)
    with folder.read_ledger() as ledger:
        assert (ledger.plan, ledger.budget_epsilon, ledger.releases) == (PLAN, 8.0, 0)


def test_without_a_target_the_plan_sets_the_budget(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path, privacy__target_epsilon=None, privacy__noise_multiplier=1.0)
    with _open(recipe).read_ledger() as ledger:
        assert ledger.budget_epsilon == PLAN.epsilon().upper
        assert ledger.most_releases == PLAN.steps


def test_the_same_run_can_be_opened_again_with_more_processes(recipe: Recipe) -> None:
    _open(recipe)
    wider = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"replicate": 2})}
    )
    assert _open(wider).read_recipe() == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe_digest": "other"}, "another recipe"),
        ({"key_fingerprint": "other"}, "another sampling key"),
        ({"num_records": 23}, "24 units of data, now there are 23"),
    ],
)
def test_a_folder_of_another_run_is_refused(recipe: Recipe, change: dict, message: str) -> None:
    _open(recipe)
    with pytest.raises(RunFolderError, match=message):
        _open(recipe, replace(_info(recipe), **change))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"run__heldout_every": 1}, True),
        ({"compute__microbatch_size": 4}, True),
        ({"parallel__context": 2}, True),
        ({"privacy__key_file": "elsewhere.key"}, True),
        ({"privacy__clip_norm": 2.0}, False),
        ({"optimizer__learning_rate": 0.5}, False),
        ({"data__sequence_length": 32}, False),
        ({"run__seed": 1}, False),
    ],
)
def test_only_what_decides_the_result_makes_it_another_run(
    tmp_path: Path, recipe_in: Callable, change: dict, same: bool
) -> None:
    changed = recipe_in(tmp_path, **change)
    assert (recipe_digest(changed) == recipe_digest(recipe_in(tmp_path))) is same


def test_a_lost_ledger_ends_the_run(recipe: Recipe) -> None:
    folder = _open(recipe)
    folder.ledger.unlink()
    with pytest.raises(LedgerError, match="does not exist"):
        _open(recipe)


def test_a_folder_with_other_things_in_it_is_left_alone(recipe: Recipe) -> None:
    recipe.run.folder.mkdir()
    precious = recipe.run.folder / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        _open(recipe)
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("ledger", [None, "unused", "torn"])
def test_a_start_that_crashed_before_its_first_release_is_no_obstacle(
    recipe: Recipe, ledger: str | None
) -> None:
    folder = _open(recipe)
    folder.info.unlink()
    if ledger is None:
        folder.ledger.unlink()
    elif ledger == "torn":
        folder.ledger.write_bytes(folder.ledger.read_bytes()[:20])
    assert _open(recipe).read_info() == _info(recipe)


def test_a_ledger_with_releases_is_never_overwritten(recipe: Recipe) -> None:
    folder = RunFolder(recipe.run.folder)
    with open_run(folder, recipe, PLAN, _info(recipe)) as ledger:
        ledger.append(step=0)
    folder.info.unlink()
    with pytest.raises(LedgerError, match="counts 1 releases"):
        _open(recipe)


def test_a_ledger_that_another_start_has_just_made_is_left_to_it(recipe: Recipe) -> None:
    recipe.run.folder.mkdir()
    folder = RunFolder(recipe.run.folder)
    with Ledger.create(folder.ledger, PLAN) as ledger:
        with pytest.raises(LedgerError, match="in use by another run"):
            _open(recipe)
        ledger.append(step=0)
    with folder.read_ledger() as counted:
        assert counted.releases == 1


def _elsewhere(info: RunInfo, version: str) -> RunInfo:
    start = Start(releases=0, processes=2, device="GPU", versions={"torch": version})
    return replace(info, starts=(start,))


def test_every_start_that_released_something_is_kept_with_its_machine(recipe: Recipe) -> None:
    folder, info = RunFolder(recipe.run.folder), _info(recipe)
    for machine, releases in (
        (info, 0),  # crashed before its first release
        (_elsewhere(info, "2.12"), 2),
        (_elsewhere(info, "2.13"), 0),
        (_elsewhere(info, "2.14"), 1),
    ):
        with open_run(folder, recipe, PLAN, machine) as ledger:
            for step in range(ledger.releases, ledger.releases + releases):
                ledger.append(step=step)
    kept = folder.read_info()
    assert [(start.releases, start.versions["torch"]) for start in kept.starts] == [
        (0, "2.12"),
        (2, "2.14"),
    ]
    assert used_versions(kept.starts) == {"torch": "2.12, then 2.14"}
    _open(recipe)  # only writes its report again
    assert len(folder.read_info().starts) == 3
    assert list(folder.read_info().worked(3)) == list(kept.starts)


def test_a_run_that_an_older_version_began_is_continued(recipe: Recipe) -> None:
    folder = _open(recipe)
    old = json.loads(folder.info.read_text()) | {"format": 1, "device": "CPU", "versions": {}}
    del old["starts"]
    folder.info.write_text(json.dumps(old))
    first = Start(releases=0, processes=None, device="CPU", versions={})
    assert folder.read_info() == replace(_info(recipe), starts=(first,))
    _open(recipe)
    assert folder.read_info() == _info(recipe)


@pytest.mark.parametrize("content", ["{", json.dumps({"format": 99}), json.dumps({"format": 1})])
def test_damaged_facts_are_reported(recipe: Recipe, content: str) -> None:
    folder = _open(recipe)
    folder.info.write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        _open(recipe)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run folder"):
        RunFolder(tmp_path).read_info()


def test_a_full_disk_at_the_start_is_reported(recipe: Recipe) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(RunFolderError, match=r"File too large.*Free disk space"):
            _open(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(recipe.run.folder.iterdir())


def test_the_head_of_a_ledger_fixes_every_line_up_to_it(recipe: Recipe) -> None:
    folder = RunFolder(recipe.run.folder)
    with open_run(folder, recipe, PLAN, _info(recipe)) as ledger:
        heads = [ledger_head(folder.ledger, 0)]
        for step in range(3):
            ledger.append(step=step)
            heads.append(ledger_head(folder.ledger, step + 1))
            assert heads == [ledger_head(folder.ledger, n) for n in range(step + 2)]
    assert len(set(heads)) == 4
    with pytest.raises(LedgerError, match="fewer than 4"):
        ledger_head(folder.ledger, 4)


def test_the_key_lies_beside_the_folder_however_it_is_named(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for name in (".", "../out", "../out/"):
        assert key_path(recipe_in(tmp_path, run__folder=name)) == tmp_path / "out.key"


def test_noise_that_lets_nothing_be_learned_is_refused(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path, privacy__target_epsilon=None, privacy__noise_multiplier=1e9)
    plan = replace(PLAN, noise_multiplier=1e9)
    with pytest.raises(RecipeError, match=r"noise_multiplier is 1e\+09, with which ε is 0"):
        open_run(RunFolder(recipe.run.folder), recipe, plan, _info(recipe))
    assert not recipe.run.folder.exists()


def test_a_new_key_is_random_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.key"
    key = load_or_create_key(path)
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path) == key
    assert load_or_create_key(tmp_path / "other.key") != key
    assert key_fingerprint(key) != key_fingerprint(os.urandom(32))
    assert key.hex() not in key_fingerprint(key)


def test_a_full_disk_leaves_no_empty_key(tmp_path: Path) -> None:
    path = tmp_path / "run.key"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(TrainerError, match=r"run\.key: File too large\. Free disk space"):
            load_or_create_key(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(load_or_create_key(path)) == 32


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [(b"x" * 32, 0o644, "chmod 600"), (b"short", 0o600, "holds 5 bytes")],
)
def test_an_unfit_key_file_is_refused(
    tmp_path: Path, content: bytes, mode: int, message: str
) -> None:
    path = tmp_path / "run.key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(TrainerError, match=message):
        load_or_create_key(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_whole(path, "a longer text")
        assert caught.value.filename == str(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    final, partial = tmp_path / "final", tmp_path / "partial"
    for folder, text in ((final, "old"), (partial, "new")):
        folder.mkdir()
        (folder / text).write_text(text)
    replace_folder(partial, final)
    assert [path.name for path in final.iterdir()] == ["new"]
    remove_folder(final)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_of_a_removal_goes_with_the_next(tmp_path: Path) -> None:
    final, partial, left = (tmp_path / name for name in ("model", "partial", ".removed-model"))
    for folder in (partial, left):
        folder.mkdir()
        (folder / "weights").write_text("1")
    replace_folder(partial, final)
    assert list(tmp_path.iterdir()) == [final]
