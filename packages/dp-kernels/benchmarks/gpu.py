"""Everything that needs a GPU, in one run of at most nine minutes: tests, ops, whole steps.

    python gpu.py [--output FOLDER] [--minutes 9]

Runs the tests of the kernels on the GPU, the benchmark of every op, and whole steps at the shapes
of Llama-3.2-1B and 3.1-8B with random weights. Each part has a share of the time that is left, so a
slow one cannot starve the others; what did not run, or failed, is recorded with the reason. Writes
one JSON file that names the GPU, and a plot of what each op reaches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SHARES = {"tests": 0.35, "steps": 0.40}
"""Part of the time that is left when a part begins; the ops have the rest between them."""
LEAST = 5.0
"""Seconds under which a part is not begun."""


@dataclass
class Run:
    """What the parts gave, and the time they have.

    Args:
        deadline: When the last part must have ended, on the monotonic clock.
        parts: Outcome of each part by name: `ok`, or why not.
        seconds: How long each took.
    """

    deadline: float
    parts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def start(self, name: str, command: Sequence[str], share: float, **options: Any) -> None:
        """Run a program within a share of the time that is left, and note how it ended."""
        limit = share * self.left
        if limit < LEAST:
            self.parts[name] = f"not begun: {self.left:.0f} s were left"
            return
        began = time.monotonic()
        try:
            ended = subprocess.run(command, timeout=limit, check=False, **options)
            self.parts[name] = "ok" if ended.returncode == 0 else f"exit status {ended.returncode}"
        except subprocess.TimeoutExpired:
            self.parts[name] = f"stopped after {limit:.0f} s"
        self.seconds[name] = time.monotonic() - began
        print(f"== {name}: {self.parts[name]}, {self.seconds[name]:.0f} s", flush=True)


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
    options.output.mkdir(parents=True, exist_ok=True)
    tests = [*_python("-m", "pytest"), "-q", "-x", str(HERE.parent / "tests")]
    run.start("tests", tests, SHARES["tests"], cwd=ROOT)
    results = _ops(run, options.output, sorted(HERE.glob("bench_*.py")))
    steps = options.output / "gpu_steps.json"
    run.start("steps", _step_command(steps, run), 1.0, cwd=ROOT)
    summary = summarised(results, run)
    (options.output / "gpu_kernels.json").write_text(json.dumps(summary, indent=1) + "\n")
    _plot(summary, options.output / "gpu_kernels.svg")
    return 0 if run.parts["tests"] == "ok" else 1


def _ops(run: Run, folder: Path, scripts: Sequence[Path]) -> dict[str, Any]:
    """Measure every op; return the results by op."""
    results: dict[str, Any] = {}
    for number, script in enumerate(scripts):
        op = script.stem.removeprefix("bench_")
        written = folder / f".gpu_{op}.json"
        share = (1.0 - SHARES["steps"]) / (len(scripts) - number)
        command = [*_python(str(script)), "--output", str(written), "--rounds", "10"]
        run.start(op, [*command, "--seconds", "2"], share, cwd=HERE)
        if written.exists():
            results[op] = json.loads(written.read_text())
            written.unlink()
    return results


def _step_command(output: Path, run: Run) -> list[str]:
    """Return the whole-step benchmark, told to begin no cell that it cannot end in time."""
    script = ROOT / "packages/dp-core/benchmarks/bench_grid.py"
    minutes = max(0.0, run.left / 60.0 - 1.0)
    return [
        *_python(str(script)),
        *("--device", "cuda", "--output", str(output), "--minutes", f"{minutes:.2f}"),
        *("--rounds", "3", "--cell-seconds", "40"),
    ]


def summarised(results: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return one result of all parts: the machine once, then every op."""
    machine = next((result["machine"] for result in results.values()), {})
    return {
        "benchmark": "kernels on a GPU",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine or {"gpu": torch.cuda.get_device_name()},
        "parts": run.parts,
        "seconds": run.seconds,
        "ops": {op: result["cases"] for op, result in results.items()},
    }


def reached(case: Mapping[str, Any], gpu: str) -> float | None:
    """Return forecast seconds over measured seconds of our op on this GPU; None if unknown."""
    forecast = next((s for name, s in case["forecast_seconds"].items() if name in gpu), None)
    ours = case["rows"].get("veilspan")
    return None if forecast is None or ours is None else forecast / ours["seconds"]


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
