"""Time of the trainer's steps beside the same training without privacy, everything included.

    python bench_run.py [--output trainer_run.json] [--cases NAME …] [--steps 10]

A step of the trainer draws units, reads and tokenizes them, differentiates, clips, adds up,
compares processes, writes the ledger to disk, draws noise, updates, and now and then shows a line.
Plain training reads the same units of the same files, with the same model, loss and AdamW, in the
micro-batches that are fastest for it; where processes share the model it is split alike. They take
turns after each step in one process (or group of processes), so that a machine that slows down
slows both. Every unit takes part in every step (q = 1): both have the same work in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from veilspan.trainer.assembly import assemble
from veilspan.trainer.data import collate
from veilspan.trainer.loop import train
from veilspan.trainer.optimizer import make_optimizer
from veilspan.trainer.processes import join_processes, leave_processes
from veilspan.trainer.recipe import Recipe, load_recipe, make_recipe
from veilspan.trainer.releases import Moment
from veilspan.trainer.run_folder import RunFolder
from veilspan.trainer.run_info import software_versions

MARKS = ("<!-- trainer_run: made by bench_run.py --markdown -->", "<!-- trainer_run: end -->")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Args:
        what: In words.
        length: Tokens T of each unit.
        units: Of each step.
        width: Of the model, which has four layers; two of width 128.
        sections: What else the recipe says.
        processes: How many, each with one thread; one process has all cores.
    """

    what: str
    length: int
    units: int
    width: int = 512
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: int = 1

    def recipe(self, folder: Path, steps: int) -> Recipe:
        """Return the recipe, on units of random bytes that `write_units` has put into `folder`."""
        wide = self.width > 128
        tree: dict[str, dict[str, Any]] = {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": self.width,
                    "intermediate_size": 11 * self.width // 4,
                    "num_hidden_layers": 4 if wide else 2,
                    "num_attention_heads": 8 if wide else 4,
                    "num_key_value_heads": 4 if wide else 2,
                    "max_position_embeddings": self.length,
                }
            },
            "data": {
                "train": str(folder / "units"),
                "pattern": "*.txt",
                "unit": "record",
                "sequence_length": self.length,
                "tokenizer": "bytes",
            },
            "privacy": {
                "noise_multiplier": 1.0,
                "delta": 1e-5,
                "sampling_probability": 1.0,
                "steps": steps,
                "clip_norm": 1.0,
            },
            "compute": {"device": "cpu", "threads": 1 if self.processes > 1 else os.cpu_count()},
            "run": {"folder": str(folder / "run"), "checkpoint_every": steps + 1},
        }
        for name, section in self.sections.items():
            tree[name] = tree.get(name, {}) | section
        return make_recipe(tree)

    def write_units(self, folder: Path) -> None:
        """Write one file of letters per unit, as long as the sequences."""
        rng = np.random.default_rng(0)
        (folder / "units").mkdir()
        for number in range(self.units):
            text = rng.integers(97, 123, self.length, dtype=np.uint8).tobytes()
            (folder / "units" / f"{number}.txt").write_bytes(text)


CASES = {
    "short": Case(what="T = 128, 64 units a step", length=128, units=64),
    "medium": Case(what="T = 1024, 8 units a step", length=1024, units=8),
    "long": Case(what="T = 4096, 2 units a step", length=4096, units=2),
    "bfloat16": Case(
        what="T = 1024, 8 units a step, products in bf16",
        length=1024,
        units=8,
        sections={"model": {"dtype": "bfloat16"}},
    ),
    "small": Case(what="width 128, T = 128, 16 units a step", length=128, units=16, width=128),
    "context": Case(
        what="T = 4096, 2 units a step, each split over 2 processes",
        length=4096,
        units=2,
        processes=2,
        sections={"parallel": {"context": 2, "layout": "zigzag"}},
    ),
    "replicas": Case(
        what="T = 1024, 8 units a step, shared out to 2 processes",
        length=1024,
        units=8,
        processes=2,
        sections={"parallel": {"replicate": 2}},
    ),
}


class PlainTurns:
    """The observer of a private run that trains plainly between two of its steps.

    Args:
        recipe: Of the private run; plain training follows it.

    Attributes:
        private: Seconds of each step of the run; the first holds its start.
        plain: Seconds of each plain step after it.
        size: Units of a micro-batch in which plain training is fastest.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._plain: _PlainTraining | None = None
        self._began = float("nan")
        self.private: list[float] = []
        self.plain: list[float] = []
        self.size = 0

    def at(self, moment: Moment, step: int) -> None:
        """Take a plain step where the run has finished one of its own."""
        if moment != "after_optimizer":
            return
        self.private.append(time.perf_counter() - self._began)
        if self._plain is None:
            self._plain = _PlainTraining(self._recipe)
            self.size = self._plain.fastest_size()
        began = time.perf_counter()
        self._plain.step(self.size)
        self._began = time.perf_counter()
        self.plain.append(self._began - began)


class _PlainTraining:
    """The same training as the run's without privacy."""

    def __init__(self, recipe: Recipe) -> None:
        parallel = recipe.parallel
        self._processes = join_processes(
            replicate=parallel.replicate, context=parallel.context, device=recipe.compute.device
        )
        self._parts = assemble(recipe, self._processes)
        self._optimizer = make_optimizer(self._parts.model, recipe.optimizer)
        self._most = 1 if parallel.context > 1 else len(self._parts.records)

    def fastest_size(self) -> int:
        """Return the size of micro-batches, a power of two, that takes least time for a step."""
        self.step(1)
        sizes = [2**k for k in range(self._most.bit_length())]
        taken = [(self._seconds(size), size) for size in sizes * 2]
        return min(taken)[1]

    def step(self, size: int) -> None:
        """Take one step over all units, `size` of them at a time."""
        parts, (index, replicas) = self._parts, self._processes.replicas
        units = np.arange(len(parts.records))[index::replicas]
        for start in range(0, len(units), size):
            batch = collate(parts.records, units[start : start + size])
            with parts.losses.sharing():
                (parts.losses.losses_B(parts.model, batch).sum() / len(parts.records)).backward()
        if replicas > 1:
            self._add_up()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _seconds(self, size: int) -> float:
        began = time.perf_counter()
        self.step(size)
        return self._processes.largest(time.perf_counter() - began)

    def _add_up(self) -> None:
        gradients = [p.grad for p in self._parts.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


def measure(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Run one case in this process and its peers, and return the seconds of the slowest of them."""
    recipe = case.recipe(folder, steps)
    turns = PlainTurns(recipe)
    train(recipe, observer=turns)
    settled = load_recipe(RunFolder(recipe.run.folder).recipe).compute.microbatch_size
    return {
        "what": case.what,
        "processes": case.processes,
        "threads_each": torch.get_num_threads(),
        "microbatch": settled,
        "plain_microbatch": turns.size,
        "private_seconds": turns.private[1:],
        "plain_seconds": turns.plain[1:],
        "ratio": quartiles([p / q for p, q in zip(turns.plain, turns.private, strict=True)][1:]),
    }


def start(name: str, steps: int) -> dict[str, Any]:
    """Run one case in processes of its own."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case.write_units(folder)
        command = [sys.executable]
        if case.processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={case.processes}"]
            command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command += [__file__, "--inside", str(folder), "--cases", name, "--steps", str(steps)]
        threads = {"OMP_NUM_THREADS": "1"} if case.processes > 1 else {}
        subprocess.run(command, check=True, env={**os.environ, **threads})
        return json.loads((folder / "case.json").read_text())


def quartiles(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        **software_versions(),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result file for the documentation."""
    machine = result["machine"]
    lines = [
        f"Measured {result['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}.",
        "",
        "| run | units at a time, private and plain | plain seconds a step | speed over plain |",
        "| --- | --- | --- | --- |",
    ]
    for case in result["cases"].values():
        ratio, plain = case["ratio"], quartiles(case["plain_seconds"])["median"]
        lines.append(
            f"| {case['what']} | {case['microbatch']}, {case['plain_microbatch']} | {plain:.2f} | "
            f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}) |"
        )
    return "\n".join(lines)


def insert(text: str, path: Path) -> None:
    """Put the table between the marks of a page."""
    page = path.read_text()
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=10, help="of each run; the first warms up")
    parser.add_argument("--quick", action="store_true", help="small: does everything run?")
    parser.add_argument("--markdown", type=Path, help="write the table of --output into this page")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        found = measure(CASES[options.cases[0]], options.inside, options.steps)
        if int(os.environ.get("RANK", "0")) == 0:
            (options.inside / "case.json").write_text(json.dumps(found))
        leave_processes()
        return
    if options.markdown:
        insert(markdown(json.loads(options.output.read_text())), options.markdown)
        return
    result: dict[str, Any] = {
        "benchmark": "a run of the trainer beside plain training",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "cases": {},
    }
    names, steps = (["small"], 4) if options.quick else (options.cases, options.steps)
    for name in names:
        result["cases"][name] = start(name, steps)
        print(markdown(result).splitlines()[-1], flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
