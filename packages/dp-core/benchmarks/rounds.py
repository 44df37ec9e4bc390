"""Interleaved timing: every method once per round, so that ratios compare the same minutes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contestants import METHODS, Method, Shape

NOISE_MULTIPLIER = 1.0


def time_rounds(
    shape: Shape, names: Sequence[str], rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds of one logical batch per round, for each method.

    A round before the first warms everything up. The order rotates by one from round to round.
    """
    methods = {name: METHODS[name](shape, NOISE_MULTIPLIER) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        tokens = shape.tokens(number + 1)
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            taken = _time(methods[name], tokens)
            if number >= 0:
                seconds[name].append(taken)
            say(f"T={shape.length} round {number + 1}/{rounds} {name}: {taken:.2f} s")
    return seconds


def _time(method: Method, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    method.gradient(tokens)
    method.update()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def throughput_ratio(method: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of baseline seconds over method seconds, paired by round."""
    return quartiles([b / m for m, b in zip(method, baseline, strict=True)])


def check_agreement(shape: Shape, names: Sequence[str]) -> None:
    """Make sure that all private methods compute the same clipped mean when no noise is added.

    Raises:
        RuntimeError: If one differs from the first by more than 1e-4 of its norm.
    """
    tokens = shape.tokens(0)
    reference: torch.Tensor | None = None
    for name in names:
        if name.startswith("plain"):
            continue
        method = METHODS[name](shape, 0.0)
        method.gradient(tokens)
        grads = [p.grad.flatten() for p in method.model.parameters() if p.grad is not None]
        gradient = torch.cat(grads)
        reference = gradient if reference is None else reference
        error = float((gradient - reference).norm() / reference.norm())
        if not error < 1e-4:
            raise RuntimeError(f"{name} computes another gradient: relative error {error:.1e}.")


def machine() -> dict[str, object]:
    """Return what the times depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = next((value.strip() for name, value in lines if name.strip() == "model name"), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def document(
    name: str, results: Sequence[Mapping[str, Any]], changes: Mapping[str, int]
) -> dict[str, Any]:
    """Return a result file: what was measured, when, on which machine, of which model."""
    model = dataclasses.asdict(Shape(length=max(row["length"] for row in results), **changes))
    return {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "model": {k: v for k, v in model.items() if k not in ("length", "records")},
        "results": list(results),
    }


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result file, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
