"""Interleaved timing: methods take turns, so that ratios compare the same seconds.

On a CPU after each micro-batch; on a GPU, where only one method's state fits, once per round.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contestants import METHODS, Method
from models import Shape

NOISE_MULTIPLIER = 1.0
RIVALS = ("opacus", "fastdp")
VERY = 2.5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a cell may take.

    Args:
        rounds: Timed rounds, at most.
        seconds: No further round starts after this many.
        until: Unix time after which, on a GPU, no further method starts.
        slow: A method that many times slower than plain training takes part in two rounds, `VERY`
            times that in one.
    """

    rounds: int
    seconds: float = float("inf")
    until: float = float("inf")
    slow: float = float("inf")


@dataclass
class Times:
    """What the rounds of one cell gave.

    Args:
        seconds: Of each method, by round.
        failures: Why a method stopped, by method.
        peaks: Peak memory above the weights, MiB, where the device tells.
    """

    seconds: dict[str, dict[int, float]]
    failures: dict[str, str]
    peaks: dict[str, float]

    def settled(self, name: str) -> dict[int, float]:
        """Return the rounds that count: without the first, which warms up, if two others exist."""
        rounds = self.seconds[name]
        return {r: s for r, s in rounds.items() if r > 0} if len(rounds) > 2 else rounds

    def paired(self, name: str, baseline: str) -> list[float]:
        """Return baseline seconds over method seconds, round by round."""
        mine, theirs = self.settled(name), self.settled(baseline)
        both = [r for r in mine if r in theirs]
        if not both:  # a method that was in the first round alone
            mine, theirs = self.seconds[name], self.seconds[baseline]
            both = [r for r in mine if r in theirs]
        return [theirs[r] / mine[r] for r in both]


Outcome = tuple[float, float | None] | Exception
"""Seconds, and on a GPU the peak memory above the weights, MiB; or what went wrong."""


class Roster:
    """Methods that take turns: kept on the CPU; on a GPU built for each round, then let go."""

    def __init__(self, shape: Shape, sizes: Mapping[str, tuple[str, int]]) -> None:
        self._shape, self._sizes = shape, sizes
        self._kept: dict[str, Method] = {}

    def round(self, names: Sequence[str], tokens: torch.Tensor) -> Iterable[tuple[str, Outcome]]:
        """Train each method on one logical batch, after something small or one micro-batch."""
        if self._shape.device == "cpu":
            return self._in_turns(names, tokens).items()
        return ((name, self._whole(name, tokens)) for name in names)

    def _in_turns(self, names: Sequence[str], tokens: torch.Tensor) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        clocks: dict[str, _Clock] = {}
        for name in names:
            try:
                self._kept[name] = self._kept.get(name) or self._built(name)
                clocks[name] = _Clock(self._kept[name], tokens)
            except Exception as error:
                found[name] = error
        step = max(self._sizes[name][1] for name in names)
        reached = [*range(step, len(tokens), step), len(tokens), math.inf]
        for turn, records in enumerate(reached):
            running = list(clocks)
            first = turn % max(1, len(running))
            for name in (*running[first:], *running[:first]):
                try:
                    clocks[name].run(records)
                except Exception as error:
                    found[name] = error
                    del clocks[name]
        return found | {name: (clock.seconds, None) for name, clock in clocks.items()}

    def _whole(self, name: str, tokens: torch.Tensor) -> Outcome:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            method = self._built(name)
            weights = sum(p.numel() * p.element_size() for p in method.model.parameters())
            torch.cuda.reset_peak_memory_stats()
            taken = _seconds(method, tokens)
        except Exception as error:
            return error
        return taken, (torch.cuda.max_memory_allocated() - weights) / 2**20

    def _built(self, name: str) -> Method:
        kind, size = self._sizes[name]
        method = METHODS[kind](self._shape, size, NOISE_MULTIPLIER)
        tokens = self._shape.tokens(0)[:size]
        _seconds(method, tokens[:, :16].contiguous() if self._shape.device == "cpu" else tokens)
        return method


def time_rounds(
    shape: Shape,
    sizes: Mapping[str, tuple[str, int]],
    limits: Limits,
    say: Callable[[str], None],
) -> Times:
    """Return the seconds of one logical batch per round, for each method.

    The order rotates by one from turn to turn and from round to round. A rival that fails is left
    out from then on, and so is any method that runs out of memory, and on a GPU any that fails: the
    others are measured. Elsewhere an error of our own is raised.

    Args:
        shape: The model and the logical batch.
        sizes: Method and records of its micro-batches, by the name of the contestant; the first is
            plain training.
        limits: When to stop.
        say: Shows one line.
    """
    names, roster = list(sizes), Roster(shape, sizes)
    times = Times({name: {} for name in names}, {}, {})
    start, plain = time.perf_counter(), names[0]
    # Whoever sets a time may interrupt after it; what was measured by then counts.
    over = (KeyboardInterrupt,) if math.isfinite(limits.until) else ()
    with contextlib.suppress(*over):
        for number in range(limits.rounds + 1):
            if plain in times.failures or (number and time.perf_counter() - start > limits.seconds):
                break
            tokens, turn = shape.tokens(number), number % len(names)
            running = [
                n for n in names if n not in times.failures and not _is_slow(times, n, limits)
            ]
            for name, outcome in roster.round((*running[turn:], *running[:turn]), tokens):
                turned = f"T={shape.length} round {number}/{limits.rounds} {name}"
                if isinstance(outcome, Exception):
                    times.failures[name] = _failure(name, outcome, raises=shape.device == "cpu")
                    say(f"{turned}: {times.failures[name]}")
                    continue
                taken, peak = outcome
                times.seconds[name][number] = taken
                if peak is not None:
                    times.peaks[name] = max(peak, times.peaks.get(name, 0.0))
                say(f"{turned}: {taken:.2f} s")
                if shape.device != "cpu" and time.time() > limits.until:
                    return times
    return times


def _failure(name: str, error: Exception, *, raises: bool) -> str:
    """Return why a method failed; what nobody expects is shown, or raised if so wanted."""
    if not (name.startswith(RIVALS) or isinstance(error, torch.OutOfMemoryError)):
        if raises:
            raise error
        traceback.print_exception(error)
    chained: BaseException | None = error
    while chained is not None:  # its frames hold the method, whose model would stay in memory
        chained.__traceback__, chained = None, chained.__context__
    return _reason(error)


def _reason(error: Exception) -> str:
    """Return one line that says what went wrong."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def _is_slow(times: Times, name: str, limits: Limits) -> bool:
    """Return whether a method has run often enough; one stall of the machine does not decide."""
    mine, theirs = times.seconds[name], times.seconds[next(iter(times.seconds))]
    if not mine or not theirs:
        return False
    allowed = limits.slow if len(mine) > 1 else VERY * limits.slow
    return min(mine.values()) > allowed * min(theirs.values())


class _Clock:
    """Counts the seconds of a method's turns on one logical batch."""

    def __init__(self, method: Method, tokens: torch.Tensor) -> None:
        self._method, self._micro_batches, self._records = method, method.gradient(tokens), 0
        self.seconds = 0.0

    def run(self, records: float) -> None:
        """Train until so many records are done; to the end, update included, for infinity."""
        start = time.perf_counter()
        while self._records < records:
            done = next(self._micro_batches, None)
            if done is None:
                self._method.update()
                break
            self._records += done
        self.seconds += time.perf_counter() - start


def _seconds(method: Method, tokens: torch.Tensor) -> float:
    gpu = tokens.device.type != "cpu"
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    collections.deque(method.gradient(tokens), maxlen=0)
    method.update()
    if gpu:
        torch.cuda.synchronize()
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


def gradient_errors(shape: Shape, names: Sequence[str], size: int) -> dict[str, float | str]:
    """Return how far each flat-clipping method's mean of clipped gradients is from our first's.

    Relative to its norm, without noise; of a rival that fails, the failure.

    Raises:
        RuntimeError: If one of ours differs from another by more than 1e-4.
    """
    tokens = shape.tokens(0)
    reference: dict[str, torch.Tensor] | None = None
    errors: dict[str, float | str] = {}
    for name in names:
        try:
            method = METHODS[name](shape, 1 if name == "single_sample" else size, 0.0)
            collections.deque(method.gradient(tokens), maxlen=0)
        except Exception as error:
            if not name.startswith(RIVALS):
                raise
            errors[name] = _reason(error)
            continue
        parameters = method.model.named_parameters()
        found = {
            n.removeprefix("_module."): torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in parameters
        }
        reference = found if reference is None else reference
        apart = sum(float((found[n] - g).square().sum()) for n, g in reference.items())
        whole = sum(float(g.square().sum()) for g in reference.values())
        errors[name] = error = (apart / whole) ** 0.5
        if error > 1e-4 and not name.startswith("fastdp"):
            raise RuntimeError(f"{name} computes another gradient: error {error:.1e}.")
    return errors


def machine() -> dict[str, object]:
    """Return what the times depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = next((value.strip() for name, value in lines if name.strip() == "model name"), cpu)
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        **gpu,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def today() -> str:
    """Return the date, UTC."""
    return datetime.now(UTC).date().isoformat()


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result file as a whole or not at all, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(path)
