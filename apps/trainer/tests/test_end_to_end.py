"""From a recipe to a model that loads elsewhere, on one process and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from veilspan.accounting import Ledger
from veilspan.accounting.bounds import round_up
from veilspan.trainer.data import open_heldout
from veilspan.trainer.loop import train
from veilspan.trainer.metrics import PUBLIC_METRICS, read_metrics
from veilspan.trainer.models import build_model
from veilspan.trainer.recipe import load_recipe
from veilspan.trainer.tokenizer import load_tokenizer

FILES = {
    "checkpoints",
    "ledger.jsonl",
    "metrics.jsonl",
    "model",
    "plots",
    "privacy_statement.json",
    "privacy_statement.md",
    "recipe.toml",
    "report.html",
    "run.json",
    "tensorboard",
}
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the quick", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    print(out.shape[1] - ids.input_ids.shape[1])
assert "veilspan" not in " ".join(sys.modules)
"""


PARALLEL = {
    "one": {},
    "two": {"parallel__context": 2, "compute__logits": "chunked"},
    "estimated": {
        "parallel__context": 2,
        "privacy__norm_probes": 8,
        "compute__microbatch_size": 2,
        "compute__kernels": "triton",
        "privacy__noise": "chacha20",
    },
    "split": {
        "parallel__replicate": 2,
        "parallel__shard": "replicate",
        "privacy__groups": "layer",
        "compute__checkpointing": "full",
        "compute__logits": "chunked",
    },
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable, run_workers: Callable
) -> dict[str, Path]:
    """Finished runs: on one process by a call, on two by the command line and by calls.

    Two that hold each sequence together, with exact and with estimated norms, and two that hold
    the model together.
    """
    root = tmp_path_factory.mktemp("runs")
    recipes = {name: recipe_in(root / name, **keys) for name, keys in PARALLEL.items()}
    files = {name: root / name / "recipe.toml" for name in PARALLEL}
    for name, recipe in recipes.items():
        files[name].write_text(recipe.to_toml())
    train(recipes["one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "veilspan.trainer", "train", str(files["two"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Finished") == 1
    done = run_workers("train_all.py", files["estimated"], files["split"], processes=2)
    assert done.stdout.count("Finished") == 2
    return {name: recipe.run.folder for name, recipe in recipes.items()}


@pytest.fixture(params=list(PARALLEL))
def finished(runs: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return runs[request.param]


@pytest.mark.distributed
def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    assert {path.name for path in (finished / "plots").iterdir()} == {
        "epsilon.png",
        "heldout_loss.png",
        "resources.png",
    }


@pytest.mark.distributed
def test_report_statement_and_ledger_state_the_epsilon_of_the_plan(finished: Path) -> None:
    with Ledger.open(finished / "ledger.jsonl", read_only=True) as ledger:
        planned = ledger.plan.epsilon().upper
        assert [entry.step for entry in ledger.entries] == list(range(ledger.plan.steps))
        assert ledger.spent().upper == planned <= 8.0
    assert f"ε ≤ {round_up(planned)}" in (finished / "report.html").read_text()
    numbers = json.loads((finished / "privacy_statement.json").read_text())
    assert numbers["epsilon"]["upper"] == planned


@pytest.mark.distributed
def test_the_heldout_loss_falls_and_only_public_quantities_are_logged(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]
    # Of memory only a GPU's is public.
    assert {name for row in rows for name in row} == set(PUBLIC_METRICS) - {"memory_gib"}


@pytest.mark.distributed
def test_the_models_load_and_generate_without_this_package(runs: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, *(str(run / "model") for run in runs.values())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = [int(line) for line in done.stdout.splitlines()]
    assert len(made) == len(runs)
    assert all(1 <= tokens <= 5 for tokens in made)


@pytest.mark.distributed
def test_the_heldout_loss_is_the_mean_over_all_tokens_however_they_are_split(
    finished: Path,
) -> None:
    recipe = load_recipe(finished / "recipe.toml")
    tokenizer = load_tokenizer(recipe)
    model, records = build_model(recipe, tokenizer), open_heldout(recipe, tokenizer)
    assert records is not None
    total, tokens = 0.0, 0
    for record in range(len(records)):
        ids = torch.from_numpy(records[record]).long()[None]
        with torch.no_grad():
            logits = model(ids).logits
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    first = read_metrics(finished / "metrics.jsonl")[0]
    assert first["heldout_loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.distributed
def test_torchrun_restarts_a_crashed_run_on_its_own(
    tmp_path: Path, run_workers: Callable, recipe_in: Callable
) -> None:
    recipe = recipe_in(
        tmp_path, parallel__replicate=2, parallel__shard="replicate", run__checkpoint_every=3
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    run_workers("crash_once.py", path, 3, processes=2, restarts=1)
    with Ledger.open(recipe.run.folder / "ledger.jsonl", read_only=True) as ledger:
        assert [entry.step for entry in ledger.entries] == [0, 1, 2, 3, 3, 4, 5, 6]
    kept = load_recipe(recipe.run.folder / "recipe.toml")
    size = kept.compute.microbatch_size
    assert size in (1, 2)  # four units a step, on two copies
    assert kept == recipe.with_microbatch(int(size))
    assert (recipe.run.folder / "model" / "model.safetensors").exists()
