"""What is printed before the first step and after the last."""

from __future__ import annotations

import math

from rich.console import Console

from veilspan.accounting.bounds import at_least
from veilspan.core import PrivateStep
from veilspan.core.support import Report
from veilspan.trainer.assembly import Parts
from veilspan.trainer.metrics import read_metrics
from veilspan.trainer.models import count_parameters
from veilspan.trainer.plots import series
from veilspan.trainer.processes import Processes
from veilspan.trainer.progress import settings_table, show_summary
from veilspan.trainer.recipe import Recipe
from veilspan.trainer.run_folder import RunFolder


def show_start(
    console: Console,
    parts: Parts,
    processes: Processes,
    folder: RunFolder,
    *,
    first_step: int,
) -> None:
    """Print configuration and plan."""
    if console.quiet:
        return
    console.print(settings_table("Run", _run_rows(parts, processes, folder, first_step)))
    console.print()
    console.print(settings_table("Privacy", _privacy_rows(parts)))
    console.print()


def show_choices(console: Console, report: Report, step: PrivateStep) -> None:
    """Print what the preflight found and what the cost model chose."""
    if console.quiet:
        return
    console.print("[bold]Preflight[/bold]: no record reaches another, every parameter has a path")
    console.print(f"{len(report.parameters)} trainable tensors, by path:", highlight=False)
    for path in dict.fromkeys(parameter.path for parameter in report.parameters):
        count = sum(parameter.path == path for parameter in report.parameters)
        console.print(f"  {path}: {count}", highlight=False)
    console.print("\n[bold]Choices of the cost model[/bold]")
    console.print(step.explain() + "\n", highlight=False, soft_wrap=True, markup=False)


def show_outcome(console: Console, folder: RunFolder, stop_reason: str | None) -> None:
    """Print the result and where it lies."""
    if console.quiet:
        return
    with folder.read_ledger() as ledger:
        spent, releases = ledger.spent(), ledger.releases
        budget = ledger.budget_epsilon or math.inf
    rows = {"privacy": f"{spent} (budget {at_least(budget, 4)}), {releases} releases in the ledger"}
    losses = series(read_metrics(folder.metrics), "heldout_loss")
    if losses:
        rows["held-out loss"] = f"{losses[0][1]:.4f} → {losses[-1][1]:.4f} nats per token"
    rows |= {"model": str(folder.model), "report": str(folder.report)}
    if stop_reason is not None:
        rows["stopped early"] = stop_reason
    show_summary(console, "Finished", rows)


def _run_rows(
    parts: Parts, processes: Processes, folder: RunFolder, first_step: int
) -> list[tuple[str, str]]:
    recipe = parts.recipe
    numbers, trainable = count_parameters(parts.model)
    heldout = "none" if parts.heldout is None else f"{len(parts.heldout):,} public records"
    rows = [
        ("model", f"{_model_name(recipe)}, {numbers:,} parameters, {trainable:,} trained"),
        (
            "data",
            f"{recipe.data.train}: {parts.records.num_units:,} units (one {recipe.data.unit} each)",
        ),
        ("sequence", f"{_sequences(recipe)}, tokenizer {recipe.data.tokenizer}"),
        ("held-out", heldout),
        ("processes", _processes_text(processes, recipe)),
        ("compute", f"{processes.device}, {recipe.model.dtype}{_arithmetic(parts)}"),
        ("micro-batch", str(parts.microbatch)),
        ("folder", str(folder.root)),
    ]
    if first_step:
        rows.append(("continues", f"after step {first_step}"))
    return rows


def _privacy_rows(parts: Parts) -> list[tuple[str, str]]:
    plan, privacy = parts.plan, parts.recipe.privacy
    estimated = "" if plan.norms is None else f", norms from {plan.norms.probes} probes"
    shared = "" if privacy.groups == "flat" else f", shared out per {privacy.groups}"
    return [
        ("guarantee", f"{plan.epsilon()} after {plan.steps:,} steps, per {plan.unit}"),
        ("noise", f"multiplier {plan.noise_multiplier:.4f}, stream {plan.noise_stream}"),
        ("sampling", f"Poisson, probability {plan.sampling_probability:.4g} per step"),
        ("batch", f"{plan.expected_batch_size:.4g} expected {parts.recipe.data.drawn}s"),
        ("clipping", f"norm {plan.clip_norm:g} ({privacy.clipping}{shared}){estimated}"),
    ]


def _arithmetic(parts: Parts) -> str:
    kernels = ", Triton kernels" if parts.recipe.compute.kernels == "triton" else ""
    return kernels + (", logits a chunk at a time" if parts.losses.chunked else "")


def _sequences(recipe: Recipe) -> str:
    tokens, each = f"{recipe.data.sequence_length:,} tokens", recipe.data.sequences_per_unit
    return tokens if each == 1 else f"{tokens}, {each} of each {recipe.data.unit}"


def _model_name(recipe: Recipe) -> str:
    if recipe.model.path is not None:
        return str(recipe.model.path)
    assert recipe.model.config is not None  # Model requires one of the two
    return f"{recipe.model.config['model_type']} from scratch"


def _processes_text(processes: Processes, recipe: Recipe) -> str:
    parts, copies = processes.context[1], processes.replicas[1]
    if processes.size == 1:
        return "1"
    if recipe.parallel.shard == "replicate":
        return f"{processes.size}, which hold one model together; each has units of its own"
    layout = f", {recipe.parallel.layout} layout" if parts > 1 else ""
    return f"{processes.size}: {copies} × {parts} (copies × parts of a sequence){layout}"
