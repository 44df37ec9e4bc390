"""Interleaved timing: every method once per round, so that ratios compare the same minutes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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


def peak_memory(shape: Shape, name: str) -> Mapping[str, float]:
    """Return peak and gradient size in MiB, measured in a process of its own."""
    command = [
        *(sys.executable, str(Path(__file__).with_name("peak_memory.py"))),
        *("--method", name, "--threads", str(torch.get_num_threads())),
        *("--shape", json.dumps(dataclasses.asdict(shape))),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


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
