"""Fixtures shared by the trainer's tests."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from veilspan.trainer import report
from veilspan.trainer.loop import train
from veilspan.trainer.recipe import Recipe, make_recipe
from veilspan.trainer.run_folder import key_path

WORKERS = Path(__file__).parent / "workers"

RunWorkers = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_workers() -> RunWorkers:
    """Run a script of `tests/workers` in one plain process or under torchrun."""

    def run(
        script: str,
        *arguments: object,
        processes: int = 1,
        restarts: int = 0,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if processes > 1 or restarts:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            command += [f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
            command += ["--rdzv-endpoint=localhost:0"]
        done = subprocess.run(
            [*command, str(WORKERS / script), *map(str, arguments)],
            # Without the second variable, gloo of a restarted worker reads the addresses of the
            # dead one from the launcher's store.
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{script} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def recipe_in() -> MakeRecipe:
    """Make the recipe of a run that takes about two seconds, in a folder of the caller's."""
    return _tiny_recipe


def _tiny_recipe(folder: Path, **overrides: Any) -> Recipe:
    """Write a little text below `folder` and return a recipe that trains on it.

    A keyword `section__key=value` sets one key of a section; None removes it.
    """
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        for number in range(24):
            words = f"text {number}: the quick brown fox {number} jumps over the lazy dog. "
            (texts / f"text{number}.txt").write_text(words * (number % 3 + 1))
        for number in range(3):
            (texts / f"held{number}.txt").write_text(f"the lazy fox {number} jumps over the dog")
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        },
        "data": {
            "train": str(texts),
            "unit": "record",
            "sequence_length": 64,
            "tokenizer": "bytes",
            "heldout_pattern": "held*",
            "heldout_is_public": True,
        },
        "privacy": {
            "target_epsilon": 8.0,
            "delta": 1e-3,
            "expected_batch_size": 4,
            "steps": 8,
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "compute": {"device": "cpu"},
        "run": {"folder": str(folder / "run"), "heldout_every": 4, "checkpoint_every": 2},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if value is None:
            tree[section].pop(key)
        else:
            tree.setdefault(section, {})[key] = value
    return make_recipe(tree)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, which is half of a small run; test_report and test_end_to_end draw them."""
    monkeypatch.setattr(report, "draw_plots", lambda *_, **__: {})


@pytest.fixture(scope="session")
def _finished(
    tmp_path_factory: pytest.TempPathFactory, recipe_in: MakeRecipe
) -> tuple[Recipe, str]:
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), privacy__steps=4, data__name="notes")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(recipe)
    return recipe, printed.getvalue()


@pytest.fixture(scope="session")
def finished_run(_finished: tuple[Recipe, str]) -> Recipe:
    """The recipe of a run of four steps that is over; its folder is for reading only."""
    return _finished[0]


@pytest.fixture(scope="session")
def finished_output(_finished: tuple[Recipe, str]) -> str:
    """What that run printed."""
    return _finished[1]


@pytest.fixture
def finished_copy(tmp_path: Path, finished_run: Recipe) -> Recipe:
    """The recipe of a copy of that run, which a test may change or continue."""
    place = tmp_path / "copy"
    shutil.copytree(finished_run.run.folder, place)
    shutil.copy2(key_path(finished_run), tmp_path / "copy.key")
    run = finished_run.run.model_copy(update={"folder": place})
    return finished_run.model_copy(update={"run": run})
