"""Fixtures shared by the trainer's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from veilspan.trainer.recipe import Recipe, make_recipe

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
