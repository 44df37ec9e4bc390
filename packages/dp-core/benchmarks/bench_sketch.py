"""Estimated norms against exact ones: operations, scratch memory and time of a layer, then a step.

    python bench_sketch.py --output core_sketch.json

A layer is one linear map and one record of T tokens, of which the squared norm of the weight's
gradient is wanted: `formed` forms the gradient, as fast gradient clipping does; `direct` and `gram`
are exact without it; `sketch` estimates it. Operations are counted while they run; scratch memory
is the growth of the resident high-water mark, once the layer's own products and a short record have
left their workspace. A step is a logical batch of a decoder: forward,
backward, clipping, noise and the optimizer; methods take turns within a round, and the ratio is
plain seconds over method seconds, paired by round. `rank` is the effective rank (Σλ)²/Σλ² of the
per-record gradients of such a decoder on real text, λ the eigenvalues of all weights' GGᵀ together;
and estimates are compared with the true norms of those gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from memory import high_water_mib
from models import QUICK, Shape
from report import insert
from rounds import Limits, machine, quartiles, time_rounds, today, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from veilspan.core import Automatic, Flat, PrivateStep, Sketch
from veilspan.core.contributions import OuterProducts
from veilspan.core.measures import Measure
from veilspan.core.norms import BlockedKernel, sq_norms
from veilspan.core.reduction import LocalShards

MARKS = ("<!-- sketch: made by bench_sketch.py --markdown -->", "<!-- sketch: end -->")
STEP_METHODS = ("plain", "two_pass", "two_pass_sketch", "bookkeeping", "bookkeeping_sketch")
RIVALS = ("opacus_fgc", "opacus_ghost")


def _product_flops(into: Any, left: Any, right: Any, **_: Any) -> int:
    """Return the operations of a batch of products, from the shapes of its operands."""
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]


_IN_PLACE = {torch.ops.aten.baddbmm_: _product_flops}  # torch counts the others itself


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear map, and the tokens of one record.

    Args:
        inputs: Features I.
        outputs: Features O.
        length: Tokens T.
        probes: Gaussian probes k.
    """

    inputs: int
    outputs: int
    length: int
    probes: int

    def methods(self) -> dict[str, Callable[[], Tensor]]:
        """Return functions that give the squared norm, `[1]` or `[1, b]`."""
        torch.manual_seed(0)
        act, grad = (
            torch.randn(1, self.length, self.inputs),
            torch.randn(1, self.length, self.outputs),
        )
        part = OuterProducts(act_BTI=act, grad_BTO=grad, kernel=BlockedKernel())
        owned = {"weight": nn.Parameter(torch.zeros(self.outputs, self.inputs))}
        measure = Measure(
            choose=lambda *shape: "direct",
            owned=owned,
            shards=LocalShards(),
            sketch=Sketch(probes=self.probes, blocks=4),
            pays=lambda *shape: True,
        )

        def sketch() -> Tensor:
            measure.begin()
            return measure.sq_norms("weight", part).values_Bb

        return {
            "formed": lambda: sq_norms(part.per_sample()),
            "direct": lambda: part.sq_norms(lambda *shape: "direct"),
            "gram": lambda: part.sq_norms(lambda *shape: "gram"),
            "sketch": sketch,
        }


def layer_rows(layer: Layer, repeats: int) -> list[dict[str, Any]]:
    """Return one row per method of one layer."""
    rows = []
    for name, method in layer.methods().items():
        counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
        with counter:
            method()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            method()
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "inputs": layer.inputs,
                "outputs": layer.outputs,
                "length": layer.length,
                "probes": layer.probes,
                "method": name,
                "operations": counter.get_total_flops(),
                "scratch_mib": _scratch_mib(layer, name),
                "seconds": quartiles(seconds),
            }
        )
    return rows


def _scratch_mib(layer: Layer, name: str) -> float:
    """Return the median of `_scratch_here` in processes of their own, whose memory is all new."""
    command = [sys.executable, __file__, "--here", name, "--layer", json.dumps(asdict(layer))]
    found = []
    for _ in range(5):
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(output.splitlines()[-1]))
    return statistics.median(found)


def _scratch_here(layer: Layer, name: str) -> float:
    """Return the growth of the resident set while the method runs, MiB.

    Before it, the layer's own products run, whose workspace the matrix library keeps, and the
    method on a short record, which loads what it needs.
    """
    method = layer.methods()[name]
    weight = torch.randn(layer.outputs, layer.inputs)
    out = torch.randn(layer.length, layer.inputs) @ weight.T
    torch.mm(out.T, out @ weight, out=weight)
    del weight, out
    replace(layer, length=8).methods()[name]()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the first call left free is no reserve
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mib()
    method()
    return high_water_mib() - before


def on_text(
    shape: Shape, records: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return effective ranks of records' gradients, and estimated over true norms.

    The model reads the bytes of this repository's pages: with its first weights, then after some
    steps of plain training on them.
    """
    model = shape.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pages = sorted(Path(__file__).parents[3].glob("docs/**/*.md"))
    text = torch.tensor(list(b"".join(page.read_bytes() for page in pages)))
    starts = torch.randint(
        len(text) - shape.length, (steps + 1, records), generator=torch.Generator().manual_seed(0)
    )
    batches = [torch.stack([text[s : s + shape.length] for s in row]) for row in starts]
    found = {"first weights": _ranks(shape, model, batches[-1])}
    for batch in batches[:-1]:
        optimizer.zero_grad()
        shape.losses(model, batch).mean().backward()
        optimizer.step()
    found[f"after {steps} steps"] = _ranks(shape, model, batches[-1])
    return found, _estimates(shape, model, batches[-1])


def _estimates(shape: Shape, model: nn.Module, batch: Tensor) -> dict[str, list[float]]:
    """Return estimated over true norms of some records, several times each."""
    found: dict[str, list[float]] = {}
    for sketch in (Sketch(blocks=1), Sketch(), Sketch(basis=8)):
        step = PrivateStep(
            model,
            clipping=Flat(clip_norm=1.0, rule=Automatic(gamma=0.0)),
            noise_multiplier=0.0,
            expected_batch_size=1.0,
            backward="two_pass",
            norms=sketch,
        )
        ratios = []
        for tokens in batch.repeat(2, 1).split(1):
            model.zero_grad()
            with step:
                step.backward(shape.losses(model, tokens))
            parts = [
                p.grad.double().square().sum() for p in model.parameters() if p.grad is not None
            ]
            ratios.append(float(torch.stack(parts).sum().rsqrt()))  # a normalised contribution
        step.detach()
        found[str(sketch)] = ratios
    return found


def _ranks(shape: Shape, model: nn.Module, batch: Tensor) -> list[float]:
    ranks = []
    for tokens in batch.split(1):
        model.zero_grad()
        shape.losses(model, tokens).sum().backward()
        total = square = 0.0
        for parameter in model.parameters():
            grad = parameter.grad
            if grad is None or grad.ndim < 2:
                continue
            side = grad if grad.shape[0] <= grad.shape[1] else grad.mT
            gram = side.double() @ side.double().mT
            total, square = total + float(gram.trace()), square + float(gram.square().sum())
        ranks.append(total**2 / square)
    return ranks


def step_rows(shape: Shape, names: list[str], limits: Limits) -> list[dict[str, Any]]:
    """Return one row per method of a training step."""
    sizes = {name: (name, shape.records) for name in names}
    times = time_rounds(shape, sizes, limits, lambda line: print(line, flush=True))
    return [
        {
            "length": shape.length,
            "records": shape.records,
            "method": name,
            "seconds": quartiles(list(times.settled(name).values())),
            "ratio": quartiles(times.paired(name, "plain")),
        }
        for name in names
        if name not in times.failures
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the tables for the documentation."""
    lines = [
        "| layer | method | operations | scratch memory | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    formed: dict[str, Any] = {}
    for row in result["layers"]:
        if row["method"] == "formed":  # the first of each layer
            formed = row
        lines.append(
            f"| {row['outputs']}×{row['inputs']}, T = {row['length']} | {_name(row)} "
            f"| {_less(row['operations'], formed['operations'])} "
            f"| {row['scratch_mib']:.2f} MiB ({_less(row['scratch_mib'], formed['scratch_mib'])}) "
            f"| {1e3 * row['seconds']['median']:.1f} ms |"
        )
    steps, ranks = result["steps"], result["ranks"]
    lines += [
        "",
        f"| step, T = {steps[0]['length']}, B = {steps[0]['records']} | seconds | ratio |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {row['method'].replace('_', ' ')} | {row['seconds']['median']:.2f} "
        f"| {row['ratio']['median']:.2f} |"
        for row in steps
    ]
    lines += _spread("effective rank of a record's gradient", ranks, "{:.0f}")
    lines += _spread("estimated over true norm", result["estimates"], "{:.3f}")
    return "\n".join(lines)


def _spread(what: str, found: dict[str, list[float]], form: str) -> list[str]:
    """Return a table of the middle and the ends of some lists of numbers."""
    lines = ["", f"| {what} | median | smallest | largest |", "| --- | --- | --- | --- |"]
    for name, values in found.items():
        numbers = (statistics.median(values), min(values), max(values))
        lines.append(f"| {name} | {' | '.join(form.format(number) for number in numbers)} |")
    return lines


def _name(row: dict[str, Any]) -> str:
    return f"sketch, k = {row['probes']}" if row["method"] == "sketch" else row["method"]


def _less(mine: float, theirs: float) -> str:
    """Return how much less, in percent of the other; `1` where it is the other."""
    return "reference" if mine == theirs else f"{100 * (mine / theirs - 1):+.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", "--json", type=Path, help="write the results here, as JSON")
    parser.add_argument("--markdown", type=Path, help="put the tables into this page")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--layer", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        print(json.dumps(_scratch_here(Layer(**options.layer), options.here)))
        return
    length = 256 if options.quick else 4096
    sides = [(64, 128)] if options.quick else [(2048, 8192), (2048, 512)]
    layers = [Layer(inputs=i, outputs=o, length=length, probes=32) for i, o in sides]
    shape = Shape(length=length, records=2, fused_head=True, **(QUICK if options.quick else {}))
    limits = Limits(rounds=1 if options.quick else options.rounds)
    methods = [*STEP_METHODS, *(() if options.quick else RIVALS)]
    ranks, estimates = on_text(
        replace(shape, length=length // 8, vocabulary=256, records=4),
        2 if options.quick else 8,
        2 if options.quick else 60,
    )
    result = {
        "benchmark": "estimated norms",
        "date": today(),
        "machine": machine(),
        "layers": [row for layer in layers for row in layer_rows(layer, options.rounds)],
        "ranks": ranks,
        "estimates": estimates,
        "steps": step_rows(shape, methods, limits),
    }
    print(markdown(result))
    write(result, options.output)
    if options.markdown:
        insert(markdown(result), options.markdown, MARKS)


if __name__ == "__main__":
    main()
