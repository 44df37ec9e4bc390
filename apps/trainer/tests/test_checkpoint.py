"""Checkpoints: whole or absent, any number of processes, nothing that runs code."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veilspan.trainer.checkpoint import CheckpointError, Checkpoints, Progress, named_tensors
from veilspan.trainer.processes import Processes

ALONE = Processes(device=torch.device("cpu"))


def _model(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.BatchNorm1d(50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 40)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _progress(step: int) -> Progress:
    return Progress(step=step, ledger_length=step, ledger_head=f"h{step}", recipe_digest="d")


def _checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep=keep, processes=ALONE)


def test_a_loaded_checkpoint_restores_weights_buffers_and_optimizer_exactly(tmp_path: Path) -> None:
    saved = named_tensors(*_model(seed=0))
    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(saved, _progress(7))
    model, optimizer = _model(seed=1)
    newest = checkpoints.newest()
    assert newest is not None
    assert checkpoints.load(newest, named_tensors(model, optimizer)) == _progress(7)
    loaded = named_tensors(model, optimizer)
    assert loaded.keys() == saved.keys()
    assert {"model.1.running_mean", "optimizer.0.weight.exp_avg_sq"} <= loaded.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_an_optimizer_without_state_can_be_restored(tmp_path: Path) -> None:
    saved = named_tensors(*_model())
    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(saved, _progress(1))
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.BatchNorm1d(50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints.load(tmp_path / "step-00000001", named_tensors(model, optimizer))
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1.0


def test_names_do_not_depend_on_activation_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    names = named_tensors(model, None).keys()
    model[0] = checkpoint_wrapper(model[0])
    assert named_tensors(model, None).keys() == names


@pytest.mark.distributed
def test_a_checkpoint_of_three_processes_can_be_read_by_one(
    run_workers: Callable, tmp_path: Path
) -> None:
    done = run_workers("save_or_load.py", "save", tmp_path, 1, 3, processes=3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    tensors = named_tensors(model, torch.optim.AdamW(model.parameters()))
    newest = _checkpoints(tmp_path).newest()
    assert newest is not None
    progress = _checkpoints(tmp_path).load(newest, tensors)
    saved = json.loads(done.stdout.splitlines()[-1])
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == saved["tensors"]
    assert progress.step == saved["step"]


@pytest.mark.distributed
def test_a_checkpoint_of_one_process_can_be_read_by_two_copies_of_the_model(
    run_workers: Callable, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    tensors = named_tensors(model, torch.optim.AdamW(model.parameters()))
    _checkpoints(tmp_path).save(tensors, _progress(4))
    done = run_workers("save_or_load.py", "load", tmp_path, 2, 1, processes=2)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == loaded["tensors"]
    assert loaded["step"] == 4


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, keep=2)
    tensors = named_tensors(*_model())
    for step in (9, 10, 11):
        checkpoints.save(tensors, _progress(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_copy_of_a_checkpoint_under_another_name_is_none_of_the_run(tmp_path: Path) -> None:
    checkpoints, tensors = _checkpoints(tmp_path, keep=1), named_tensors(*_model())
    checkpoints.save(tensors, _progress(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.bak")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-00000001"
    checkpoints.save(tensors, _progress(2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001.bak", "step-00000002"]


def test_what_kills_left_of_other_steps_is_removed(tmp_path: Path) -> None:
    checkpoints, tensors = _checkpoints(tmp_path), named_tensors(*_model())
    for name in (".removed-step-00000001", ".partial-step-00000004"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "shard.safetensors").write_bytes(b"part")
    checkpoints.save(tensors, _progress(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_crash_while_writing_leaves_the_previous_checkpoint_the_newest(tmp_path: Path) -> None:
    checkpoints, tensors = _checkpoints(tmp_path), named_tensors(*_model())
    checkpoints.save(tensors, _progress(1))

    def crash() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tensors, _progress(2), before_rename=crash)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-00000001"
    checkpoints.save(tensors, _progress(2))  # what was left behind is no obstacle
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_full_disk_is_reported_and_the_previous_checkpoint_survives(tmp_path: Path) -> None:
    checkpoints, tensors = _checkpoints(tmp_path), named_tensors(*_model())
    checkpoints.save(tensors, _progress(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses larger files
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*Free disk space"):
            checkpoints.save(tensors, _progress(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == "step-00000001"
    checkpoints.load(newest, tensors)


@pytest.mark.parametrize("damage", ["truncate", "no_info", "other_format", "other_model"])
def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoints, tensors = _checkpoints(tmp_path), named_tensors(*_model())
    checkpoints.save(tensors, _progress(1))
    folder = tmp_path / "step-00000001"
    info = folder / "checkpoint.json"
    if damage == "truncate":
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "no_info":
        info.write_text("{")
    elif damage == "other_format":
        info.write_text(info.read_text().replace('"format": 1', '"format": 99'))
    else:
        tensors["model.extra.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoints.load(folder, tensors)


def test_pitfall_45_a_checkpoint_holds_no_pickle_and_reading_it_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, tensors = _checkpoints(tmp_path), named_tensors(*_model())
    checkpoints.save(tensors, _progress(1))
    folder = tmp_path / "step-00000001"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    checkpoints.load(folder, tensors)
