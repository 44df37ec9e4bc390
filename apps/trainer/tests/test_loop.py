"""One process through the whole loop: budget, ledger, restarts, schedule, clock."""

from __future__ import annotations

import itertools
import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veilspan.accounting import BudgetExceeded, Ledger, LedgerError
from veilspan.core import Draw, new_key, poisson_batches
from veilspan.trainer import loop
from veilspan.trainer.checkpoint import CheckpointError, read_progress
from veilspan.trainer.errors import RecipeError, TrainerError
from veilspan.trainer.interrupts import Interrupted, StopAsked
from veilspan.trainer.loop import key_path, train
from veilspan.trainer.metrics import PUBLIC_METRICS, read_metrics
from veilspan.trainer.optimizer import learning_rate, make_optimizer
from veilspan.trainer.processes import Processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import RunFolder, recipe_digest
from veilspan.trainer.sections import Optimizer
from veilspan.trainer.throughput import Throughput

pytestmark = pytest.mark.usefixtures("without_plots")


class StopError(RuntimeError):
    """Ends a run from inside, as a fault would."""


class SignalAt:
    """An observer that sends this process a signal at one moment, once or several times."""

    def __init__(self, number: int, moment: str, step: int, *, times: int = 1) -> None:
        self._number, self._at, self._times = number, (moment, step), times

    def at(self, moment: str, step: int) -> None:
        for _ in range(self._times if (moment, step) == self._at else 0):
            signal.raise_signal(self._number)


class StopAt:
    """An observer that raises at one moment."""

    def __init__(self, moment: str, step: int) -> None:
        self._at = (moment, step)

    def at(self, moment: str, step: int) -> None:
        if (moment, step) == self._at:
            raise StopError


def _ledger(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", read_only=True)


def _newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def _key_of_empty_draws(records: int, probability: float, *, steps: int) -> bytes:
    while True:
        key = new_key()
        if not any(len(draw) for draw in poisson_batches(records, probability, steps, key=key)):
            return key


@pytest.fixture
def recipe(tmp_path: Path, recipe_in: Callable) -> Recipe:
    return recipe_in(tmp_path, privacy__steps=4)


def test_the_ledger_names_the_data(
    finished_run: Recipe, tmp_path: Path, recipe_in: Callable
) -> None:
    with _ledger(finished_run.run.folder) as ledger:
        assert ledger.data == finished_run.data.name == "notes"
    with pytest.raises(RecipeError, match=r"data\.name"):
        recipe_in(tmp_path, data__name=" ")


def test_a_finished_run_is_not_trained_again(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    before = (folder / "ledger.jsonl").read_bytes()
    weights = load_file(folder / "model" / "model.safetensors")
    (folder / "report.html").unlink()
    train(finished_copy)
    assert (folder / "ledger.jsonl").read_bytes() == before
    again = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert (folder / "report.html").exists()


def test_a_run_continues_after_a_fault_and_stops_when_the_budget_is_spent(recipe: Recipe) -> None:
    with pytest.raises(StopError):
        train(recipe, observer=StopAt("after_ledger", 2))
    folder = train(recipe)
    with _ledger(folder) as ledger:
        assert [entry.step for entry in ledger.entries] == [0, 1, 2, 2]
        assert ledger.spent().upper <= 8.0
    assert read_progress(_newest(folder)).step == 3  # one release was paid for and lost
    assert (folder / "model" / "model.safetensors").exists()
    assert "4 releases for 3 steps" in (folder / "privacy_statement.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_every_step_first(
    tmp_path: Path, recipe_in: Callable, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    recipe = recipe_in(tmp_path, privacy__steps=4, run__checkpoint_every=100)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step 2 of 4.*same command continues") as caught:
        train(recipe, observer=SignalAt(number, "after_ledger", 1))
    assert caught.value.signal_number == number
    assert "stops when this step is finished" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    assert read_progress(_newest(recipe.run.folder)).step == 2
    with _ledger(train(recipe)) as ledger:
        assert [entry.step for entry in ledger.entries] == [0, 1, 2, 3]


def test_a_run_that_is_interrupted_twice_stops_at_once(recipe: Recipe) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=SignalAt(signal.SIGINT, "after_ledger", 1, times=2))
    assert signal.getsignal(signal.SIGINT) == before
    assert not (recipe.run.folder / "checkpoints").exists()
    with _ledger(recipe.run.folder) as ledger:
        assert [entry.step for entry in ledger.entries] == [0, 1]


def test_the_budget_ends_a_run_with_everything_a_finished_one_has(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StopError):
        train(recipe, observer=StopAt("after_ledger", 0))
    folder = train(recipe)
    assert "stopped early" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 3]
    assert read_progress(_newest(folder)).step == 3
    assert (folder / "report.html").exists()


def test_a_release_that_cannot_be_recorded_does_not_happen(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("could not be written: No space left on device")

    drawn = []
    noise = loop.PrivateStep._release  # the noise is drawn there, after the ledger

    def watch(step: loop.PrivateStep) -> None:
        noise(step)
        drawn.append(step.next_step)

    monkeypatch.setattr(loop.PrivateStep, "_release", watch)
    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(LedgerError, match="No space left"):
        train(recipe)
    assert drawn == []
    assert not (recipe.run.folder / "checkpoints").exists()


def test_pitfall_02_an_empty_draw_is_a_step_with_noise(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(
        tmp_path, privacy__expected_batch_size=0.1, privacy__steps=3, run__checkpoint_every=1
    )
    key = _key_of_empty_draws(24, 0.1 / 24, steps=3)
    monkeypatch.setattr(
        loop,
        "poisson_batches",
        lambda *sizes, **rest: poisson_batches(*sizes, **rest | {"key": key}),
    )
    folder = train(recipe)
    with _ledger(folder) as ledger:
        assert ledger.releases == 3
    assert read_progress(_newest(folder)).step == 3
    two, three = (
        load_file(next(_folder.glob("*.safetensors")))
        for _folder in sorted((folder / "checkpoints").iterdir())
    )
    assert not torch.equal(two["model.lm_head.weight"], three["model.lm_head.weight"])


def test_a_full_disk_during_a_checkpoint_loses_nothing(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, privacy__steps=6)
    real = loop.Checkpoints.save

    def fail_once(self: loop.Checkpoints, tensors: dict, progress: loop.Progress, **kwargs) -> None:
        if progress.step == 4:
            raise CheckpointError("Cannot write the checkpoint: No space left on device")
        real(self, tensors, progress, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Checkpoints, "save", fail_once)
        with pytest.raises(CheckpointError, match="No space left"):
            train(recipe)
    assert _newest(recipe.run.folder).name == "step-00000002"
    train(recipe)
    with _ledger(recipe.run.folder) as ledger:
        assert [entry.step for entry in ledger.entries] == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        ("metrics", "MetricsLog.write", "metrics.jsonl"),
        ("loop", "write_statement", "privacy_statement.md"),
        ("loop", "write_report", "privacy_statement.md"),
    ],
)
def test_a_file_that_does_not_fit_on_the_disk_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, module: str, name: str, file: str
) -> None:
    target = f"veilspan.trainer.{module}.{name}"
    real = resolve_name(target)

    def full(*arguments: object, **keys: object) -> object:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # the kernel refuses more
        try:
            return real(*arguments, **keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match="File too large") as caught:
            train(recipe)
    assert Path(caught.value.filename).name == file
    with _ledger(train(recipe)) as ledger:
        assert ledger.releases == 4
    assert [row["step"] for row in read_metrics(recipe.run.folder / "metrics.jsonl")] == [0, 4]


def test_a_ledger_that_lost_its_end_is_refused(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match="end of the ledger was lost"):
        train(finished_copy)


def test_a_ledger_that_was_replaced_by_a_younger_one_is_refused(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    with _ledger(folder) as ledger:
        plan, run_id = ledger.plan, ledger.run_id
    (folder / "ledger.jsonl").unlink()
    with Ledger.create(folder / "ledger.jsonl", plan, budget_epsilon=8.0, run_id=run_id) as forged:
        for step in range(4):
            forged.append(step=step)
    with pytest.raises(LedgerError, match="not the ledger that the newest checkpoint"):
        train(finished_copy)


def test_a_checkpoint_of_another_run_is_refused(finished_copy: Recipe) -> None:
    folder = finished_copy.run.folder
    info = _newest(folder) / "checkpoint.json"
    info.write_text(info.read_text().replace(recipe_digest(finished_copy), "0" * 64))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(finished_copy)


def test_pitfall_49_nothing_a_run_writes_names_a_private_quantity(
    finished_run: Recipe, finished_output: str
) -> None:
    folder = finished_run.run.folder
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows
    assert {name for row in rows for name in row} <= set(PUBLIC_METRICS)
    assert (
        json.loads((folder / "run.json").read_text()).keys()
        == RunFolder(folder).read_info().__dict__.keys()
    )
    lines = [line for line in finished_output.splitlines() if line.startswith("step ")]
    assert len(lines) == 5
    for line in lines:
        quantities = re.sub(r"\d[\d.,:/]*", "#", line)
        assert quantities in (
            "step # · ε # of # · held-out loss # · # passed",
            "step # · ε # of # · held-out loss # · # tokens/s · # left",
            "step # · ε # of # · held-out loss # · # tokens/s · # passed",
        )


def test_the_key_is_in_no_file_of_the_run_folder(finished_run: Recipe) -> None:
    folder = finished_run.run.folder
    key = key_path(finished_run).read_bytes()
    assert key_path(finished_run).parent == folder.parent
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        assert key not in content, path
        assert key.hex().encode() not in content, path


def test_names_of_folders_are_shown_as_they_are(
    tmp_path: Path, recipe_in: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[lr]" / "run[" / "of]"
    train(recipe_in(tmp_path, run__folder=str(folder), privacy__steps=2))
    assert "/[lr]/run[/of]" in "".join(capsys.readouterr().out.split())


def test_no_two_releases_share_a_draw(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []

    def noted(*sizes: Any, key: bytes, **rest: Any) -> Iterator[Draw]:
        keys.append(key)
        return poisson_batches(*sizes, key=key, **rest)

    monkeypatch.setattr(loop, "poisson_batches", noted)
    settings = {"privacy__key_file": str(tmp_path / "shared.key"), "privacy__steps": 2}
    one, two = (recipe_in(tmp_path, run__folder=str(tmp_path / n), **settings) for n in "ab")
    with pytest.raises(StopError):
        train(one, observer=StopAt("before_ledger", 0))
    with pytest.raises(StopError):
        train(one, observer=StopAt("after_optimizer", 0))  # nothing was released before
    train(one)
    train(two)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert key_path(one).read_bytes() not in keys


def test_pitfall_50_the_learning_rate_depends_on_the_step_only() -> None:
    settings = Optimizer(learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.25)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.5, rel=0.05)
    constant = settings.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 19, 20) == 2.0


def test_norms_and_biases_never_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].weight.requires_grad_(False)
    groups = make_optimizer(model, Optimizer(weight_decay=0.1)).param_groups
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    others = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert [id(p) for p in decayed] == [id(model[0].weight)]
    assert len(others) == 4


def test_the_last_held_out_loss_is_that_of_the_model(tmp_path: Path, recipe_in: Callable) -> None:
    recipe = recipe_in(tmp_path, run__checkpoint_every=3, run__heldout_every=1)
    with pytest.raises(StopError):
        train(recipe, observer=StopAt("after_optimizer", 7))
    folder = train(recipe)
    finished = read_progress(_newest(folder)).step
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    assert steps == list(range(finished + 1))


@pytest.mark.parametrize("drawn", [1, 7, 50])
def test_throughput_does_not_tell_how_many_units_were_drawn(
    drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Throughput(expected_tokens=800.0, replicas=1, device=torch.device("cpu"))
    now = [0.0]
    monkeypatch.setattr(clock, "_now", lambda: now[0])
    for _ in range(drawn):
        with clock.microbatch(100, full=True):
            now[0] += 2.0
    with clock.microbatch(10, full=False):
        now[0] += 1.9
    clock.begin_release()
    now[0] += 4.0
    clock.end_release()
    assert clock.rate() == 800.0 / (8 * 2.0 + 4.0)
    assert clock.rate() is None


def test_throughput_does_not_tell_how_long_units_are(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[int, bool]] = []
    microbatch = Throughput.microbatch

    def noted(clock: Throughput, tokens: int, *, full: bool) -> AbstractContextManager[None]:
        timed.append((tokens, full))
        return microbatch(clock, tokens, full=full)

    monkeypatch.setattr(Throughput, "microbatch", noted)
    train(recipe_in(tmp_path, data__sequence_length=100, compute__microbatch_size=1))
    assert {tokens for tokens, full in timed if full} == {100}
    assert {tokens for tokens, full in timed if not full} - {100}


def test_memory_of_a_process_that_reads_private_rows_is_not_published(
    finished_run: Recipe,
) -> None:
    rows = read_metrics(finished_run.run.folder / "metrics.jsonl")
    assert rows
    assert not any("memory_gib" in row for row in rows)


@pytest.mark.distributed
def test_pitfall_16_processes_that_read_other_data_are_refused(
    tmp_path: Path, recipe_in: Callable, run_workers: Callable
) -> None:
    """As machines do whose data folders are not copies: their draws have nothing in common."""
    cases = {
        "text0.txt": "different training data; ",
        "text24.txt": "different numbers of units and training data; ",
        "recipe.toml": "different recipes; ",
    }
    for other, rank in itertools.product(cases, range(2)):
        folder = tmp_path / other / str(rank)
        epsilon = 7.0 if rank and other == "recipe.toml" else 8.0
        settings = recipe_in(
            folder, parallel__replicate=2, run__folder="run", privacy__target_epsilon=epsilon
        )
        data = settings.data.model_copy(update={"train": Path("texts")})
        recipe = settings.model_copy(update={"data": data})
        (folder / "recipe.toml").write_text(recipe.to_toml())
        if rank and other != "recipe.toml":
            (folder / "texts" / other).write_text("something else")
    run_workers("each_its_own.py", *(tmp_path / other for other in cases), processes=2)
    for (other, message), rank in itertools.product(cases.items(), range(2)):
        folder = tmp_path / other / str(rank)
        assert message in (folder / "error.txt").read_text()
        assert not (folder / "run").exists()


def test_processes_that_fail_in_two_ways_raise_the_same_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else one would go on to an evaluation, the other to a checkpoint, and each wait for ever."""

    def gather(failures: list, mine: object) -> None:
        failures[:] = [(BudgetExceeded, "spent"), mine]

    monkeypatch.setattr(Processes, "distributed", True)
    monkeypatch.setattr(Processes, "size", 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    together = Processes(device=torch.device("cpu")).together()
    with pytest.raises(BudgetExceeded, match="spent") as caught, together:
        raise StopAsked("15")
    assert isinstance(caught.value.__cause__, StopAsked)


def test_several_processes_without_torchrun_are_refused(
    tmp_path: Path, recipe_in: Callable
) -> None:
    with pytest.raises(TrainerError, match="torchrun --nproc-per-node 2"):
        train(recipe_in(tmp_path, parallel__replicate=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"compute__checkpointing": "full", "model__dtype": "bfloat16"},
        {"compute__microbatch_size": 3, "compute__backward": "two_pass"},
        {"compute__microbatch_size": 2, "compute__backward": "bookkeeping"},
        {"privacy__groups": "block", "privacy__sums": "exact"},
        {
            "privacy__groups": "layer",
            "compute__microbatch_size": 2,
            "compute__backward": "per_layer",
        },
        {"privacy__clipping": "automatic", "privacy__noise": "philox"},
        {
            "compute__kernels": "triton",
            "privacy__noise": "chacha20",
            "compute__microbatch_size": 2,
            "compute__backward": "bookkeeping",
        },
        {"model__lora": {"rank": 2}, "model__dtype": "bfloat16"},
    ],
)
def test_every_way_to_compute_trains(tmp_path: Path, recipe_in: Callable, settings: dict) -> None:
    folder = train(recipe_in(tmp_path, privacy__steps=2, **settings))
    with _ledger(folder) as ledger:
        assert ledger.releases == 2
    weights = load_file(folder / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_pitfall_39_sequences_of_a_document_are_counted_together(
    tmp_path: Path, recipe_in: Callable
) -> None:
    cut = recipe_in(tmp_path, data__unit="document", data__sequences_per_unit=3)
    folder = train(cut)
    with _ledger(folder) as ledger:
        assert ledger.plan.records_per_unit == 3
        assert ledger.plan.sampling_probability == pytest.approx(
            cut.privacy.expected_batch_size / (3 * 24)
        )
        assert ledger.spent().upper <= cut.privacy.target_epsilon
    statement = (folder / "privacy_statement.md").read_text()
    assert "Each document holds at most 3 records" in statement
    assert "cut each document into 3 sequences" in statement
    report = re.sub(r"\s+", " ", (folder / "report.html").read_text())
    assert "as 3 sequences, each drawn and clipped by itself" in report
    assert "each sequence joins each step independently" in report


def test_one_process_needs_no_parallel_package_and_several_say_what_to_install(
    tmp_path: Path, recipe_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "veilspan.parallel", None)
    assert (train(recipe_in(tmp_path, privacy__steps=2)) / "report.html").exists()
    with pytest.raises(TrainerError, match=r"veilspan-trainer\[parallel\]"):
        train(recipe_in(tmp_path, parallel__context=2, run__folder=str(tmp_path / "other")))
