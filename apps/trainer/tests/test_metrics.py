"""Only declared, public quantities are ever written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from veilspan.trainer.errors import TrainerError
from veilspan.trainer.metrics import PUBLIC_METRICS, MetricsLog, read_metrics


def _log(folder: Path) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl", folder / "tensorboard")


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.write(0, {"epsilon": 0.0})
        log.write(5, {"epsilon": 1.5, "heldout_loss": 3.25})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 0, "epsilon": 0.0}, {"step": 5, "epsilon": 1.5, "heldout_loss": 3.25}]


@pytest.mark.parametrize(
    "name", ["loss", "train_loss", "grad_norm", "clip_fraction", "batch_size", "seconds"]
)
def test_pitfall_49_a_quantity_that_is_not_declared_public_is_refused(
    tmp_path: Path, name: str
) -> None:
    with _log(tmp_path) as log, pytest.raises(TrainerError, match=name):
        log.write(1, {"epsilon": 1.0, name: 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_every_public_quantity_says_why_it_may_be_published() -> None:
    assert all(metric.reason.endswith(".") for metric in PUBLIC_METRICS.values())


def test_tensorboard_gets_the_same_values_without_the_time_they_took(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        log.write(3, {"heldout_loss": 2.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["heldout_loss"]
    (event,) = events.Scalars("heldout_loss")
    assert (event.step, event.value, event.wall_time) == (3, 2.0, 3.0)


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "epsilon": 0.5}) + '\n{"step": 2, "eps')
    with _log(tmp_path) as log:
        log.write(2, {"epsilon": 0.75})
    assert [row["epsilon"] for row in read_metrics(path)] == [0.5, 0.75]


def test_steps_that_a_crash_lost_appear_only_as_they_were_repeated(tmp_path: Path) -> None:
    with _log(tmp_path) as log:
        for step, epsilon in ((0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)):
            log.write(step, {"epsilon": epsilon})
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", first_step=1) as log:
        log.write(1, {"epsilon": 0.4})
        log.write(2, {"epsilon": 0.5})  # the last one: step 3 did not come back
    expected = [(0, 0.0), (1, 0.4), (2, 0.5)]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["epsilon"]) for row in rows] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("epsilon")]
    assert shown == [(step, pytest.approx(value)) for step, value in expected]
