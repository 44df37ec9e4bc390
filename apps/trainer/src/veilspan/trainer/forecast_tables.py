"""A forecast as tables on the terminal."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console

from veilspan.accounting.bounds import at_least, at_most, round_up
from veilspan.trainer.forecast import EFFICIENCY, Forecast
from veilspan.trainer.progress import settings_table


def show_forecast(console: Console, forecast: Forecast) -> None:
    """Print what a run will cost in privacy, memory and time."""
    for title, rows in {
        "Privacy": _privacy(forecast),
        "Model": _model(forecast),
        "Memory of each process": _memory(forecast),
        "Time": _time(forecast),
    }.items():
        console.print(settings_table(title, list(rows.items())))
        console.print()
    console.print("Nothing was trained.")


def _privacy(forecast: Forecast) -> dict[str, str]:
    plan, epsilon = forecast.plan, forecast.epsilon
    lower, each = at_most(epsilon.lower, 4), plan.records_per_unit
    drawn = plan.unit if each == 1 else "sequence"
    of_each = "" if each == 1 else f", {each} sequences of each"
    heldout = f"{forecast.num_heldout:,} public records" if forecast.num_heldout else "none"
    return {
        "unit": f"{plan.unit}, N = {forecast.num_records:,} (treated as public){of_each}",
        "held-out": heldout,
        "ε at the end": f"at most {round_up(epsilon.upper)}, at least {lower}",
        "δ": f"{at_least(plan.delta, 4)} (1/N = {1 / forecast.num_records:.3g})",
        "noise multiplier σ": f"{plan.noise_multiplier:.4f}",
        "clip norm C": f"{plan.clip_norm:g}",
        "sampling": f"Poisson, probability {plan.sampling_probability:.4g}",
        "expected batch": f"{plan.expected_batch_size:.4g} {drawn}s",
        "steps": f"{plan.steps:,}",
        "noise stream": plan.noise_stream,
    }


def _model(forecast: Forecast) -> dict[str, str]:
    model = forecast.model
    return {
        "parameters": f"{model.parameters:,}",
        "trained": f"{model.trainable:,}",
        "blocks": f"{model.blocks}",
        "sequence length": f"{model.sequence_length:,} tokens",
        "forward pass": f"{model.forward_flops / 1e9:,.1f} GFLOP per sequence",
    }


def _memory(forecast: Forecast) -> dict[str, str]:
    rows = {"micro-batch": str(forecast.microbatch)}
    rows |= {name: _size(count) for name, count in forecast.memory.items()}
    return rows | {"total (tensors only)": _size(sum(forecast.memory.values()))}


def _time(forecast: Forecast) -> dict[str, str]:
    speed = forecast.flops_per_second / 1e9
    return {
        "processes": f"{forecast.processes}",
        "matrix products": f"{speed:,.1f} GFLOP/s per process, measured here and now",
        "assumed share of it": f"{EFFICIENCY:.0%}, and every {forecast.plan.unit} at full length",
        "all steps": f"about {timedelta(seconds=max(1, round(forecast.seconds)))}",
    }


def _size(count: int) -> str:
    """Return bytes in the unit that gives at least one digit before the point."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.1f} {units[0]}"
