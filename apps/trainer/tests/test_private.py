"""A loop of the user's own: exact budget, honest ledger, no record twice, clear refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from veilspan.accounting import BudgetExceeded, Ledger, LedgerError, PrivacyPlan
from veilspan.core import (
    Flat,
    GaussianNoise,
    PerLayer,
    PhiloxNoise,
    PrivacyError,
    PrivateStep,
    new_key,
    poisson_batches,
)
from veilspan.core.protocols import NoiseSource
from veilspan.core.streams import Philox4x64
from veilspan.kernels import TritonNoise
from veilspan.trainer import PrivateBatch, PrivateTraining, make_private
from veilspan.trainer.errors import TrainerError
from veilspan.trainer.private_checks import collate_tensors

RECORDS = 60
ARGUMENTS: dict[str, Any] = {
    "target_epsilon": 8.0,
    "delta": 1e-3,
    "steps": 6,
    "expected_batch_size": 10,
}


class Endless(torch.utils.data.IterableDataset):
    """A stream that says how long it is."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(RECORDS))

    def __len__(self) -> int:
        return RECORDS


class Points:
    """A map-style dataset of dicts."""

    def __init__(self, records: int = RECORDS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(records, 4, generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked.append(index)
        return {"x": self.x[index], "y": self.x[index].sum()}


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Setting:
    """Model, optimizer, dataset and ledger of one test."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.dataset = Points()
        self.path = folder / "run" / "ledger.jsonl"

    def make(self, **changes: Any) -> PrivateTraining:
        arguments = {**ARGUMENTS, "ledger": self.path, **changes}
        given = {name: value for name, value in arguments.items() if value is not None}
        return make_private(self.model, self.optimizer, self.dataset, **given)

    def losses_B(self, records: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.model(records["x"]).squeeze(1) - records["y"]).square()

    def work_on(self, private: PrivateTraining, batch: PrivateBatch) -> None:
        with batch:
            for records in batch.microbatches():
                private.backward(self.losses_B(records))

    def train(self, private: PrivateTraining) -> None:
        for batch in private.batches():
            self.work_on(private, batch)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def _key_of_empty_draws(probability: float, steps: int) -> bytes:
    while True:
        key = new_key()
        if not any(len(d) for d in poisson_batches(RECORDS, probability, steps, key=key)):
            return key


def test_the_budget_is_reached_and_not_exceeded(setting: Setting) -> None:
    private = setting.make()
    assert private.epsilon().upper == 0
    setting.train(private)
    assert 7.9 < private.epsilon().upper <= 8.0
    assert private.ledger.releases == 6
    assert list(private.batches()) == []
    with pytest.raises(BudgetExceeded):
        private.ledger.append(step=6)
    private.close()
    assert private.epsilon().upper <= 8.0


def test_the_ledger_on_disk_counts_every_release(setting: Setting) -> None:
    private = setting.make()
    for count, batch in enumerate(private.batches(), start=1):
        setting.work_on(private, batch)
        setting.optimizer.zero_grad()
        with Ledger.open(setting.path, read_only=True) as ledger:
            assert ledger.releases == count
            assert ledger.spent() == private.epsilon()


@pytest.mark.parametrize("microbatch_size", [1, 4, "auto"])
def test_it_equals_the_loop_written_by_hand(
    setting: Setting, tmp_path: Path, microbatch_size: Any
) -> None:
    sampling, noise = new_key(), new_key()
    private = setting.make(
        key=sampling, noise=GaussianNoise(noise), microbatch_size=microbatch_size
    )
    setting.train(private)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = PrivacyPlan.calibrate(
        target_epsilon=8.0,
        delta=1e-3,
        sampling_probability=10 / RECORDS,
        steps=6,
        clip_norm=1.0,
        expected_batch_size=10 / RECORDS * RECORDS,
    )
    assert private.plan == plan
    step = PrivateStep(
        model,
        clipping=Flat(clip_norm=1.0),
        noise_multiplier=plan.noise_multiplier,
        expected_batch_size=10 / RECORDS * RECORDS,
        noise=GaussianNoise(noise),
    )
    x = setting.dataset.x
    for draw in poisson_batches(RECORDS, 10 / RECORDS, 6, key=sampling):
        with step:
            for rows in draw.microbatches(private.microbatch.size):
                step.backward((model(x[rows]).squeeze(1) - x[rows].sum(1)).square())
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), setting.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_pitfall_02_an_empty_draw_is_a_release_with_noise(setting: Setting) -> None:
    key = _key_of_empty_draws(0.2 / RECORDS, 3)
    private = setting.make(expected_batch_size=0.2, steps=3, key=key)
    for batch in private.batches():
        with batch:
            assert list(batch.microbatches()) == []
        for parameter in setting.model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.count_nonzero() == parameter.numel()
        setting.optimizer.zero_grad()
    assert private.ledger.releases == 3
    assert setting.dataset.asked == []


def test_an_error_inside_discards_the_batch_and_the_next_loop_repeats_it(setting: Setting) -> None:
    private = setting.make(microbatch_size=2)
    batches = private.batches()
    batch = next(batches)
    with pytest.raises(ZeroDivisionError), batch:
        for records in batch.microbatches():
            private.backward(setting.losses_B(records))
        raise ZeroDivisionError
    assert private.ledger.releases == 0
    assert all(parameter.grad is None for parameter in setting.model.parameters())
    with pytest.raises(PrivacyError, match="step 0 was not released"):
        next(batches)
    first, setting.dataset.asked = setting.dataset.asked, []
    setting.work_on(private, next(private.batches()))
    assert setting.dataset.asked == first
    assert private.ledger.releases == 1


def test_a_batch_that_is_never_entered_is_an_error(setting: Setting) -> None:
    private = setting.make()
    with pytest.raises(PrivacyError, match="with batch:"):
        for _ in private.batches():
            pass


def _first_with(private: PrivateTraining, least: int) -> tuple[PrivateBatch, Any]:
    """Return an entered batch and its first micro-batch, of at least so many records."""
    batch = next(private.batches())
    batch.__enter__()
    records = next(batch.microbatches())
    assert len(records["x"]) >= least
    return batch, records


def test_pitfall_16_no_record_counts_twice(setting: Setting) -> None:
    private = setting.make(sampling_probability=1.0, expected_batch_size=None, microbatch_size=30)
    batch, records = _first_with(private, 30)
    with pytest.raises(PrivacyError, match="second pass"):
        next(batch.microbatches())
    private.backward(setting.losses_B(records))
    with pytest.raises(PrivacyError, match="30 losses for a micro-batch with 0 records left"):
        private.backward(setting.losses_B(records))


def test_pitfall_16_records_of_a_batch_are_read_in_its_own_block_only(setting: Setting) -> None:
    """Two draws in one release would count a record that is in both twice."""
    private = setting.make()
    batches = private.batches()
    first = next(batches)
    with first:
        pass
    setting.optimizer.zero_grad()
    with pytest.raises(PrivacyError, match="outside of its `with batch:`"), next(batches):
        list(first.microbatches())
    assert private.ledger.releases == 1


def test_a_run_that_is_printed_shows_neither_key_nor_records(setting: Setting) -> None:
    key = new_key()
    private = setting.make(key=key)
    private.dataset = ["a private record"]
    shown = repr(private)
    assert repr(key) not in shown
    assert "a private record" not in shown
    assert repr(private.plan) in shown


def test_losses_of_another_number_of_records_are_refused(setting: Setting) -> None:
    private = setting.make(sampling_probability=1.0, expected_batch_size=None, microbatch_size=30)
    _, records = _first_with(private, 30)
    with pytest.raises(PrivacyError, match="29 losses for a micro-batch with 30 records"):
        private.backward(setting.losses_B(records)[1:])


def test_a_mean_in_place_of_losses_is_refused(setting: Setting) -> None:
    private = setting.make(sampling_probability=1.0, expected_batch_size=None)
    _, records = _first_with(private, 1)
    with pytest.raises(PrivacyError, match="one floating-point loss per record"):
        private.backward(setting.losses_B(records).mean())


def test_a_release_that_cannot_be_recorded_does_not_happen(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("could not be written: No space left on device")

    private = setting.make()
    monkeypatch.setattr(Ledger, "append", full)
    with pytest.raises(LedgerError, match="No space left"):
        setting.work_on(private, next(private.batches()))
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_a_ledger_is_continued_where_it_ended(setting: Setting) -> None:
    private = setting.make()
    for _, batch in zip(range(4), private.batches(), strict=False):
        setting.work_on(private, batch)
        setting.optimizer.zero_grad()
    private.close()
    again = setting.make()
    setting.train(again)
    assert [entry.step for entry in again.ledger.entries] == [0, 1, 2, 3, 4, 5]
    assert again.epsilon().upper <= 8.0
    again.close()
    with pytest.raises(LedgerError, match="another plan"):
        setting.make(steps=7)
    assert not any("forward" in vars(module) for module in setting.model.modules())


def test_a_ledger_is_not_continued_on_other_data(setting: Setting) -> None:
    private = setting.make(data="notes of 2025")
    assert private.ledger.data == "notes of 2025"
    private.close()
    for again in ({}, {"data": "notes of 2025"}):
        setting.make(**again).close()
    with pytest.raises(TrainerError, match=r"data is 'letters'.*'notes of 2025'.*another ledger"):
        setting.make(data="letters")
    setting.make().close()  # the refusal let go of it


def test_a_ledger_without_a_name_is_given_none_later(setting: Setting) -> None:
    setting.make().close()
    with pytest.raises(TrainerError, match="data without a name"):
        setting.make(data="letters")


def test_a_refused_model_leaves_no_ledger(setting: Setting) -> None:
    setting.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    with pytest.raises(PrivacyError, match="BatchNorm"):
        setting.make()
    assert not setting.path.exists()


def test_epochs_are_expected_passes_rounded_up_to_steps(setting: Setting) -> None:
    assert setting.make(steps=None, epochs=2).plan.steps == 12
    setting.path = setting.path.with_name("other")
    setting.model = make_model()
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    other = setting.make(
        steps=None, epochs=1, sampling_probability=1 / 49, expected_batch_size=None
    )
    assert other.plan.steps == 49


def test_clipping_and_noise_reach_step_plan_and_statement(setting: Setting) -> None:
    private = setting.make(
        clipping=PerLayer(clip_norm=0.5),
        noise=PhiloxNoise(new_key()),
        unit="document",
        backward="two_pass",
    )
    assert private.step.sensitivity == pytest.approx(0.5)
    assert private.plan.clip_norm == 0.5
    assert private.plan.noise_stream == "philox"
    assert "document" in private.plan.statement()
    setting.train(private)


@pytest.mark.parametrize(
    ("noise", "stream"),
    [
        (GaussianNoise(new_key(), words=Philox4x64()), "philox"),
        (TritonNoise(new_key(), stream="philox4x32"), "philox"),
        (TritonNoise(new_key()), "chacha20"),
    ],
)
def test_pitfall_51_the_plan_names_the_stream_that_draws(
    setting: Setting, noise: NoiseSource, stream: str
) -> None:
    assert setting.make(noise=noise).plan.noise_stream == stream


def test_a_unit_of_several_records_gets_more_noise(setting: Setting, tmp_path: Path) -> None:
    one = setting.make(unit="person")
    one.close()
    setting.path = tmp_path / "several.jsonl"
    several = setting.make(unit="person", records_per_unit=3)
    assert several.plan.records_per_unit == 3
    assert several.plan.sampling_probability == one.plan.sampling_probability
    assert several.plan.noise_multiplier > 1.5 * one.plan.noise_multiplier
    assert "Each person holds at most 3 records" in several.plan.statement()
    setting.train(several)
    assert several.epsilon().upper <= 8.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_epsilon": -1.0}, r"target_epsilon: is -1\.0; must be greater than 0"),
        ({"delta": 0.5}, r"^delta is 0\.5, but it must be below 1/N"),
        ({"delta": "small"}, r"delta: is 'small'.*'auto'"),
        ({"steps": 0}, "steps: is 0"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"epochs": 1}, "exactly one of steps and epochs"),
        ({"steps": None, "epochs": 0}, "epochs is 0"),
        ({"steps": None, "epochs": float("inf")}, "epochs is inf"),
        ({"expected_batch_size": 61}, r"^expected_batch_size is 61.*only 60"),
        ({"expected_batch_size": None}, "exactly one of sampling_probability and expected"),
        ({"sampling_probability": 0.1}, "exactly one of sampling_probability and expected"),
        ({"microbatch_size": 0}, "microbatch_size: is 0.*'auto'"),
        ({"microbatch_size": "automatic"}, "microbatch_size: is 'automatic'.*'auto'"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"clipping": 1.0}, r"clipping is 1\.0; pass Flat"),
        ({"key": b"short"}, "key"),
        ({"data": " "}, "data is ' '"),
        ({"records_per_unit": 0}, "records_per_unit is 0"),
        ({"max_grad_norm": 1.0}, r"takes no max_grad_norm: pass clipping=Flat.*backward, norms"),
        ({"noise_multiplier": 1.0}, "takes no noise_multiplier: the noise follows from target"),
        ({"shuffle": True}, r"takes no shuffle\. Beyond its own arguments it takes"),
        ({"ledger": ""}, "ledger is ''; name the file"),
    ],
)
def test_a_wrong_argument_is_named(setting: Setting, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setting.make(**changes)
    assert not setting.path.exists()
    assert not any("forward" in vars(module) for module in setting.model.modules())


def test_pitfall_01_a_stream_is_no_dataset(setting: Setting) -> None:
    setting.dataset = iter([])  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="dataset is a list_iterator"):
        setting.make()


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        ("model", "gpt2", "model is 'gpt2'; pass the torch.nn.Module"),
        ("optimizer", torch.optim.AdamW, "optimizer is <class .*made for the parameters"),
        ("dataset", {"train": [], "test": []}, "dataset is a dict with the keys 'train', 'test'"),
        ("dataset", [], "There is no unit to train on"),
        ("dataset", Endless(), "dataset is a Endless; it must have len and an item"),
    ],
)
def test_a_part_of_the_wrong_kind_is_named(
    setting: Setting, part: str, wrong: object, message: str
) -> None:
    setattr(setting, part, wrong)
    with pytest.raises(ValueError, match=message):
        setting.make()
    assert not setting.path.exists()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda i: [1, 2, 3], r"Field 'y' of a record is a list.*with_format\(\"torch\"\)"),
        (lambda i: [[1.0]] * (i + 1), "Field 'y' of a record is a list"),
        (lambda i: torch.zeros(i + 1), "cannot make a micro-batch.*equal size.*pads records"),
        (lambda i: None, "cannot make a micro-batch.*NoneType.*leaves out what is no tensor"),
    ],
)
def test_records_that_the_default_collate_cannot_stack_are_told_what_to_do(
    setting: Setting, field: Callable[[int], object], message: str
) -> None:
    records = [{"x": torch.randn(4), "y": field(i)} for i in range(RECORDS)]
    setting.dataset = records  # pyright: ignore[reportAttributeAccessIssue]
    private = setting.make(expected_batch_size=RECORDS)
    with pytest.raises(ValueError, match=message):
        setting.work_on(private, next(private.batches()))
    assert private.ledger.releases == 0


def test_the_default_collate_takes_texts_and_nested_tensors(setting: Setting) -> None:
    records = [{"x": torch.ones(2), "names": ["a", "b"], "y": (1, 2.0)}] * 3
    got = collate_tensors(records)
    assert got["x"].shape == (3, 2)
    assert len(got["y"]) == 2


def test_pitfall_11_the_optimizer_holds_exactly_what_is_private(setting: Setting) -> None:
    extra = nn.Parameter(torch.zeros(1))
    setting.optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ValueError, match="parameters that model does not train"):
        setting.make()
    setting.optimizer = torch.optim.SGD(setting.model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer lacks 2\.weight"):
        setting.make()


def test_several_processes_are_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="for one process, and there are 2"):
        setting.make()


def test_the_cost_model_chooses_the_micro_batch(setting: Setting) -> None:
    chosen = setting.make().microbatch
    assert 1 < chosen.size <= 10
    assert "cost model" in chosen.reason


@pytest.mark.parametrize(("length", "least", "most"), [(None, 1, 1), (4, 2, 8), (10**9, 1, 1)])
def test_records_with_tokens_need_their_length_for_a_choice(
    tmp_path: Path, length: int | None, least: int, most: int
) -> None:
    setting = Setting(tmp_path)
    setting.model = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(32, 1))
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    private = setting.make(sequence_length=length, expected_batch_size=8)
    assert least <= private.microbatch.size <= most


def test_images_need_their_size_for_a_choice(setting: Setting) -> None:
    setting.model = nn.Sequential(nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(12, 1))
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    assert setting.make().microbatch.reason == "sequence_length was not given"


def test_the_package_imports_without_torch() -> None:
    program = "import sys, veilspan.trainer; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
