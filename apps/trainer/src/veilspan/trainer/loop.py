"""Training with differential privacy, from a recipe to a run folder.

The code reads in the order of the data: plan, sampler, batch, share, forward, losses, backward,
then inside `PrivateStep` norms, clipping, reduction, ledger and noise, and at last the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from veilspan.accounting import BudgetExceeded, Ledger
from veilspan.core import Draw, PrivateStep, poisson_batches
from veilspan.trainer.assembly import (
    Parts,
    assemble,
    check,
    describe,
    private_step,
    require_alike,
    with_microbatch,
)
from veilspan.trainer.checkpoint import (
    CheckpointError,
    Checkpoints,
    Progress,
    named_tensors,
    require_ledger_of,
)
from veilspan.trainer.data import collate
from veilspan.trainer.export import export_model
from veilspan.trainer.interrupts import Interrupted, StopAsked, StopRequests
from veilspan.trainer.mechanism import check_arithmetic
from veilspan.trainer.monitor import Monitor
from veilspan.trainer.optimizer import learning_rate, make_optimizer, set_learning_rate
from veilspan.trainer.overview import show_choices, show_outcome, show_start
from veilspan.trainer.processes import Processes, join_processes
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.releases import Observer, ReleaseGate, Unobserved
from veilspan.trainer.report import write_report, write_statement
from veilspan.trainer.run_folder import (
    RunFolder,
    key_path,
    ledger_head,
    open_run,
    recipe_digest,
)
from veilspan.trainer.secrets import key_of_start, load_or_create_key
from veilspan.trainer.throughput import Throughput


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run between two steps.

    Args:
        parts: Model, data and plan.
        processes: Who works on it.
        folder: Where results go.
        ledger: Releases so far, on the first process only.
        gate: Through which every release goes.
        step: The private mechanism.
        optimizer: AdamW.
        checkpoints: Where to continue after a crash.
        throughput: Clock.
        observer: Told where the run is.
    """

    parts: Parts
    processes: Processes
    folder: RunFolder
    ledger: Ledger | None
    gate: ReleaseGate
    step: PrivateStep
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    throughput: Throughput
    observer: Observer


def train(recipe: Recipe, *, observer: Observer | None = None) -> Path:
    """Train a model with differential privacy; every process that torchrun started calls this.

    A run that was interrupted continues from its newest checkpoint. A run that is finished, or
    whose budget is spent, only writes its model and report again.

    Args:
        recipe: The run.
        observer: Told where in a step the run is; for tests and monitoring.

    Returns:
        The run folder.

    Raises:
        TrainerError: If anything the user can put right is wrong; nothing is lost.
        LedgerError: If the ledger is damaged, of another run, or cannot be written.
        PrivacyError: If the model cannot be trained with the stated guarantee.
        Interrupted: After SIGINT or SIGTERM between two steps, when everything is saved.

    Guarantee:
        The model and everything in the run folder is
        (ε, δ)-differentially private for the ε that the ledger gives. It counts every attempt at
        every step.
    """
    parallel = recipe.parallel
    if recipe.compute.threads is not None:
        torch.set_num_threads(recipe.compute.threads)
    processes = join_processes(
        replicate=parallel.replicate, context=parallel.context, device=recipe.compute.device
    )
    with processes.together():
        check_arithmetic(recipe, processes.device)
    with processes.together():
        parts = assemble(recipe, processes)
    require_alike(parts, processes)
    parts = with_microbatch(parts, processes)
    with _opened(parts, processes) as (folder, key, ledger):
        run, first_step = _resume(parts, processes, folder, ledger, observer or Unobserved())
        console = Console(quiet=not processes.is_first)
        show_start(console, parts, processes, folder, first_step=first_step)
        show_choices(console, check(parts, run.step, run.throughput), run.step)
        with Monitor(console, parts, processes, folder, ledger, first_step=first_step) as monitor:
            _steps(run, key, first_step, monitor)
        _finish(run, monitor)
        show_outcome(console, folder, monitor.stop_reason)
    return folder.root


@contextmanager
def _opened(parts: Parts, processes: Processes) -> Iterator[tuple[RunFolder, bytes, Ledger | None]]:
    """Open run folder and ledger on the first process; give this start's key to all, in memory."""
    folder, key, ledger = RunFolder(parts.recipe.run.folder), b"", None
    with processes.together():
        if processes.is_first:
            key = load_or_create_key(key_path(parts.recipe))
            ledger = open_run(folder, parts.recipe, parts.plan, describe(parts, processes, key))
            key = key_of_start(key, ledger_head(folder.ledger, ledger.releases))
    try:
        yield folder, processes.broadcast(key), ledger
    finally:
        if ledger is not None:
            ledger.close()


def _resume(
    parts: Parts, processes: Processes, folder: RunFolder, ledger: Ledger | None, observer: Observer
) -> tuple[Run, int]:
    """Attach the mechanism and go back to the newest checkpoint."""
    optimizer = make_optimizer(parts.model, parts.recipe.optimizer)
    checkpoints = Checkpoints(
        folder.checkpoints, keep=parts.recipe.run.keep_checkpoints, processes=processes
    )
    newest = processes.broadcast(checkpoints.newest() if processes.is_first else None)
    first_step = 0
    if newest is not None:
        progress = checkpoints.load(newest, named_tensors(parts.model, optimizer))
        with processes.together():
            _require_same_run(parts.recipe, folder, ledger, progress)
        first_step = progress.step
    gate = ReleaseGate(ledger, processes, observer)
    tokens = (parts.plan.expected_batch_size or 0.0) * parts.recipe.data.sequence_length
    run = Run(
        parts=parts,
        processes=processes,
        folder=folder,
        ledger=ledger,
        gate=gate,
        step=private_step(parts, processes, gate, first_step=first_step),
        optimizer=optimizer,
        checkpoints=checkpoints,
        throughput=Throughput(tokens, processes.replicas[1], processes.device),
        observer=observer,
    )
    return run, first_step


def _require_same_run(
    recipe: Recipe, folder: RunFolder, ledger: Ledger | None, progress: Progress
) -> None:
    """Refuse a checkpoint or a ledger that was put there from elsewhere, or cut."""
    if progress.recipe_digest != recipe_digest(recipe):
        raise CheckpointError(
            f"The newest checkpoint in {folder.checkpoints} belongs to another run. Remove it, or "
            "restore the checkpoints of this run."
        )
    if ledger is not None:
        require_ledger_of(progress, ledger, folder)


def _steps(run: Run, key: bytes, first_step: int, monitor: Monitor) -> None:
    """Take the steps that remain, as far as the budget goes and nobody asks to stop."""
    plan = run.parts.plan
    monitor.show(first_step, run.throughput)
    with StopRequests(quiet=not run.processes.is_first) as stop:
        try:
            _take_steps(run, key, first_step, monitor, stop)
        except StopAsked as asked:
            if monitor.finished > first_step and not run.checkpoints.has(monitor.finished):
                _save(run, monitor.finished)
            raise Interrupted(
                f"Interrupted after step {monitor.finished} of {plan.steps}, with every finished "
                f"step saved in {run.folder.root}. The same command continues the run.",
                int(str(asked)),
            ) from None


def _take_steps(
    run: Run, key: bytes, first_step: int, monitor: Monitor, stop: StopRequests
) -> None:
    recipe, plan = run.parts.recipe, run.parts.plan
    draws = poisson_batches(
        len(run.parts.records),
        plan.sampling_probability,
        max(plan.steps, first_step),
        key=key,
        first_step=first_step,
    )
    for draw in draws:
        try:
            run.gate.require_budget(stop.require_none)
            _step(run, draw)
        except BudgetExceeded as reason:
            monitor.stop(reason, run.throughput)
            return
        finished = draw.step + 1
        run.observer.at("after_optimizer", draw.step)
        monitor.show(finished, run.throughput)
        if finished % recipe.run.checkpoint_every == 0 and finished < plan.steps:
            _save(run, finished)


def _step(run: Run, draw: Draw) -> None:
    """Turn one draw into one update; an empty draw is a step like any other."""
    parts, clock = run.parts, run.throughput
    settings = parts.recipe.optimizer
    set_learning_rate(run.optimizer, learning_rate(settings, draw.step, parts.plan.steps))
    with run.step:
        for units, is_unit_B in _microbatches(run, draw):
            batch = collate(parts.records, units)
            full = batch.input_ids.shape == parts.full_shape
            timed = clock.microbatch(batch.input_ids.numel(), full=full)
            with timed, parts.losses.sharing():
                run.step.backward(parts.losses.losses_B(parts.model, batch), is_unit_B)
        clock.begin_release()
    run.optimizer.step()
    run.optimizer.zero_grad()
    clock.end_release()


def _microbatches(run: Run, draw: Draw) -> Iterator[tuple[NDArray[np.int64], torch.Tensor | None]]:
    """Yield the units of this process, with which of them are of the draw; None for all."""
    size, replicas = run.parts.microbatch.size, run.processes.replicas
    if run.parts.recipe.parallel.shard == "context":
        yield from ((units, None) for units in draw.share(*replicas).microbatches(size))
    else:
        for units, is_unit in draw.filled_microbatches(size, *replicas):
            yield units, torch.from_numpy(is_unit)


def _save(run: Run, finished: int) -> None:
    """Write a checkpoint; called between two steps only."""
    releases, head = 0, ""
    with run.processes.together():
        if run.ledger is not None:
            releases = run.ledger.releases
            head = ledger_head(run.folder.ledger, releases)
    progress = Progress(
        step=finished,
        ledger_length=releases,
        ledger_head=head,
        recipe_digest=recipe_digest(run.parts.recipe),
    )
    run.checkpoints.save(
        named_tensors(run.parts.model, run.optimizer),
        progress,
        before_rename=lambda: run.observer.at("during_save", finished),
    )


def _finish(run: Run, monitor: Monitor) -> None:
    """Keep the result: checkpoint, statement, model, report."""
    run.step.detach()
    if not run.checkpoints.has(monitor.finished):
        _save(run, monitor.finished)
    statement = ""
    with run.processes.together():
        if run.processes.is_first:
            statement = write_statement(run.folder.root)
    export_model(run.parts.model, run.parts.recipe, run.folder, run.processes, note=statement)
    with run.processes.together():
        if run.processes.is_first:
            write_report(run.folder.root)
