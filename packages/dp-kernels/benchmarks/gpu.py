"""Everything that needs a GPU, in one run of at most nine minutes: tests, ops, whole steps.

    python gpu.py [--output FOLDER] [--minutes 9]

Runs the tests of the kernels on the GPU, the benchmark of every op, and whole steps at the shapes
of Llama-3.2-1B and 3.1-8B with random weights. Each part has a share of the time that is left, so a
slow one cannot starve the others; what did not run, or failed, is recorded with the reason, and
the end of what it said: of the tests, every failure with a short traceback. Writes one JSON file
that names the GPU, and a plot of what each op reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SHARES = {"tests": 0.30, "steps": 0.35}
"""Part of the time that is left: for the tests at first, for whole steps after them. The ops have
the rest between them, in equal parts."""
MODELS = {"llama-3.2-1b": 0.45, "llama-3.1-8b": 1.0}
"""Models whose whole steps are measured, each with its part of the time that is left."""
METHODS = ("plain", "auto", "single_sample", "bookkeeping", "per_layer", "per_layer_triton")
"""Ways of training whose whole steps there is time for; the last one uses the kernels."""
TOO_LONG = ("torch.compile",)
"""Contestants of ops whose compiler alone takes longer than an op may."""
LEAST = 10.0
"""Seconds under which a part is not begun: it would only start Python and the GPU."""
GRACE = 15.0
"""Seconds in which a part whose time is over may still say what it found."""
KEPT = 20_000
"""Characters of what a part said that are kept where it did not end well."""
WORKERS = 4
"""Processes that run tests: compiling kernels takes most of the time, and 64-bit indices memory."""


@dataclass
class Run:
    """What the parts gave, and the time they have.

    Args:
        deadline: When the last part must have ended, on the monotonic clock.
        parts: Outcome of each part by name: `ok`, or why not.
        seconds: How long each took.
        said: The end of what each said that did not end well.
    """

    deadline: float
    parts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline, less what a part takes to end."""
        return self.deadline - time.monotonic() - GRACE

    def start(self, name: str, command: Sequence[str], share: float, *, folder: Path) -> None:
        """Run a program within a share of the time that is left, and note how it ended.

        Args:
            name: Name of the part.
            command: The program; `{until}` in an argument becomes the Unix time of its end.
            share: Its part of the time that is left.
            folder: Where it runs.
        """
        limit = share * self.left
        if limit < LEAST:
            self.parts[name] = f"not begun: {self.left:.0f} s were left"
            return
        print(f"-- {name}, at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        until = f"{time.time() + 0.8 * limit:.0f}"
        command = [argument.replace("{until}", until) for argument in command]
        status, said = run_within(command, limit, folder)
        self.seconds[name] = time.monotonic() - began
        if status == 0:
            self.parts[name] = "ok"
        else:
            why = f"stopped after {limit:.0f} s" if status is None else f"exit status {status}"
            self.parts[name], self.said[name] = why, said[-KEPT:]
        print(f"{said}== {name}: {self.parts[name]}, {self.seconds[name]:.0f} s", flush=True)


def run_within(command: Sequence[str], limit: float, folder: Path) -> tuple[int | None, str]:
    """Run a program for a limited time; return its exit status, None if stopped, and what it said.

    When time is over it is interrupted, as by Ctrl-C, so that it can report, and soon after ended
    with all that it started: a process that is left would keep its memory on the GPU.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stream:
        program = subprocess.Popen(
            command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = program.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(program.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of the group is left
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        stream.seek(0)
        return status, stream.read()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 2 without a GPU, 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu.py needs an NVIDIA GPU and a CUDA build of torch; neither was found here.")
        return 2
    run = Run(time.monotonic() + 60.0 * options.minutes)
    options.output = options.output.resolve()  # parts run in other folders
    options.output.mkdir(parents=True, exist_ok=True)
    written = options.output / "gpu_kernels.json"
    run.start("tests", _test_command(), SHARES["tests"], folder=ROOT)
    _write(summarised({}, run), written)  # whatever ends this program leaves what is known
    results = _ops(run, options.output, sorted(HERE.glob("bench_*.py")))
    _write(summarised(results, run), written)
    steps = options.output / "gpu_steps.json"
    steps.unlink(missing_ok=True)
    for model, share in MODELS.items():
        run.start(f"steps {model}", _step_command(model, steps), share, folder=ROOT)
    summary = summarised(results, run)
    # Not before: this process should hold no memory of the GPU while others use it.
    summary["machine"] = summary["machine"] or {"gpu": torch.cuda.get_device_name()}
    _write(summary, written)
    _plot(summary, options.output / "gpu_kernels.svg")
    return 0 if run.parts["tests"] == "ok" else 1


def _ops(run: Run, folder: Path, scripts: Sequence[Path]) -> dict[str, Any]:
    """Measure every op; return the results by op."""
    results: dict[str, Any] = {}
    kept = SHARES["steps"] * run.left
    for number, script in enumerate(scripts):
        op = script.stem.removeprefix("bench_")
        written = folder / f".gpu_{op}.json"
        written.unlink(missing_ok=True)
        share = max(0.0, 1.0 - kept / run.left) / (len(scripts) - number) if run.left > 0 else 0.0
        command = [*_python(str(script)), "--output", str(written), "--rounds", "10"]
        command += ["--seconds", "2", "--until", "{until}", "--without", *TOO_LONG]
        run.start(op, command, share, folder=HERE)
        if written.exists():
            results[op] = json.loads(written.read_text())
            written.unlink()
    return results


def _test_command() -> list[str]:
    """Return the tests that differ on a GPU: all failures, with short tracebacks."""
    tests = HERE.parent / "tests"
    several = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    return [
        *_python("-m", "pytest", "-q", "--tb=short", "-rfE", *several, str(tests)),
        f"--ignore={tests / 'test_aot.py'}",  # compiles for GPUs that are not here, for minutes
    ]


def _step_command(model: str, output: Path) -> list[str]:
    """Return the whole-step benchmark of a model, told when to begin nothing more."""
    script = ROOT / "packages/dp-core/benchmarks/bench_grid.py"
    return [
        *_python(str(script), "--device", "cuda", "--output", str(output), "--continue"),
        *("--models", model, "--sizes", "1", "--lengths", "4096", "16384"),
        *("--methods", *METHODS, "--rounds", "3", "--cell-seconds", "40", "--until", "{until}"),
    ]


def summarised(results: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return one result of all parts: the machine once, then every op."""
    machine = next((result["machine"] for result in results.values()), {})
    return {
        "benchmark": "kernels on a GPU",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "parts": run.parts,
        "seconds": run.seconds,
        "said": run.said,
        "stopped": {op: result["stopped"] for op, result in results.items() if "stopped" in result},
        "ops": {op: result["cases"] for op, result in results.items()},
    }


def reached(case: Mapping[str, Any], gpu: str) -> float | None:
    """Return forecast seconds over measured seconds of our op on this GPU; None if unknown."""
    forecast = next((s for name, s in case["forecast_seconds"].items() if name in gpu), None)
    ours = case["rows"].get("veilspan")
    return None if forecast is None or ours is None else forecast / ours["seconds"]


def _write(summary: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(summary, indent=1) + "\n")


def _plot(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the share of its roofline that each case of each op reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpu = summary["machine"].get("gpu", "")
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for place, cases in enumerate(summary["ops"].values()):
        shares = [share for case in cases if (share := reached(case, gpu)) is not None]
        axes.plot([place] * len(shares), shares, "o", alpha=0.6)
    axes.set_xticks(range(len(summary["ops"])), list(summary["ops"]), rotation=60, ha="right")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylabel("forecast seconds / measured seconds")
    axes.set_title(f"Kernels on {gpu or 'an unnamed GPU'}, {summary['date']}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


if __name__ == "__main__":
    sys.exit(main())
