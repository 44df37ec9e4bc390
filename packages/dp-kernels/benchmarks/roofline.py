"""What the ops should cost on GPUs that were not measured: a roofline, as a Markdown table.

    python roofline.py
    python roofline.py --markdown docs/kernels.md

The second puts the table between its marks in the page. Nothing here is a measurement: bytes and
operations are counted by each op's `work`, rates are those of data sheets times an efficiency.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from veilspan.kernels import ops
from veilspan.kernels.roofline import BANDWIDTH_EFFICIENCY, DEVICES, GEMM_EFFICIENCY, Work

LENGTHS = (1024, 4096, 16384)
LINEAR = {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
"""Input and output features of the linear maps of Llama-3.1-8B."""
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
"""Parameters of one of its 32 layers."""
MARKS = ("<!-- forecast: made by roofline.py --markdown -->", "<!-- forecast: end -->")

Rows = Iterator[tuple[str, Work]]


def linear(op: ModuleType) -> Rows:
    """Yield the rows of an op with `work(samples, tokens, inputs, outputs)`, one sample."""
    for tokens in LENGTHS:
        for name, (inputs, outputs) in LINEAR.items():
            yield f"{name}, T = {tokens}", op.work(1, tokens, inputs, outputs)


def accumulate(op: ModuleType) -> Rows:
    """Yield one layer in bf16, added to fp32 and to int64."""
    yield "one layer, bf16 to fp32", op.work(LAYER, gradient_bytes=2)
    yield "one layer, bf16 to int64", op.work(LAYER, gradient_bytes=2, total_bytes=8)


def add_noise(op: ModuleType) -> Rows:
    """Yield one layer in fp32, from each stream."""
    for stream in ("chacha20", "philox4x32"):
        yield f"one layer, fp32, {stream}", op.work(LAYER, stream=stream)


def tokenwise(op: ModuleType) -> Rows:
    """Yield the rows of an op with `work(batch, tokens, width)`, one sample."""
    for tokens in LENGTHS:
        yield f"width 4096, T = {tokens}", op.work(1, tokens, 4096)


def embedding_sum(op: ModuleType) -> Rows:
    """Yield sums over the tokens of one sample, all of them different."""
    for tokens in LENGTHS:
        yield f"width 4096, T = {tokens}", op.work(tokens, 4096, rows=tokens)


def head(op: ModuleType) -> Rows:
    """Yield the head over one sample."""
    for tokens in LENGTHS:
        yield f"V = 128256, T = {tokens}", op.work(tokens, 128256, 4096)


def cross_entropy(op: ModuleType) -> Rows:
    """Yield the logits of one chunk of the head."""
    yield "V = 128256, 4096 tokens", op.work(4096, 128256)


def weighted_sum(op: ModuleType) -> Rows:
    """Yield the stored gradients of four samples of one layer."""
    yield "one layer, 4 samples", op.work(4, LAYER)


FORECASTS: dict[str, Callable[[ModuleType], Rows]] = {
    "accumulate": accumulate,
    "add_noise": add_noise,
    "affine_norm": tokenwise,
    "bias_norm": tokenwise,
    "clipped_sum": linear,
    "cross_entropy": cross_entropy,
    "direct_norm": linear,
    "embedding_inner": tokenwise,
    "embedding_norm": tokenwise,
    "embedding_sum": embedding_sum,
    "fused_head": head,
    "gram_norm": linear,
    "layerwise_clip": linear,
    "per_sample_grad": linear,
    "sketch_norm": linear,
    "weighted_sum": weighted_sum,
}
"""How each op counts its work at these sizes; an op without an entry is an error."""


def op_names() -> list[str]:
    """Return the ops of the package: the modules in `ops` that count their work."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    return [name for name in names if hasattr(_module(name), "work")]


def table() -> str:
    """Return the forecast.

    Raises:
        KeyError: If an op has no entry in `FORECASTS`.
    """
    heads = ["op", "size, Llama-3.1-8B", "MB", "GFLOP", *(f"{name}, µs" for name in DEVICES)]
    lines = [f"| {' | '.join(heads)} | bound by |", "| --- | --- |" + " ---: |" * 5 + " --- |"]
    for name in op_names():
        if name not in FORECASTS:
            raise KeyError(f"op {name!r} has no entry in FORECASTS of roofline.py")
        for size, work in FORECASTS[name](_module(name)):
            times = [f"{1e6 * work.seconds(device):.0f}" for device in DEVICES.values()]
            cells = [f"`{name}`", size, f"{work.bytes / 1e6:.0f}", f"{work.flops / 1e9:.0f}"]
            lines.append(f"| {' | '.join([*cells, *times])} | {bound(work)} |")
    return "\n".join(lines)


def bound(work: Work) -> str:
    """Return what takes longest on an H100."""
    limits = {
        "products": Work(flops=work.flops),
        "memory": Work(bytes=work.bytes),
        "integer instructions": Work(integers=work.integers),
    }
    return max(limits, key=lambda name: limits[name].seconds(DEVICES["H100"]))


def text() -> str:
    """Return the forecast with what it assumes."""
    return (
        "**A forecast, not a measurement.** One call, operands in bf16, one sample. Products at "
        f"{GEMM_EFFICIENCY:.0%} of the bf16 peak,\nmemory at {BANDWIDTH_EFFICIENCY:.0%} of the "
        "bandwidth, integer instructions at 64 a clock and multiprocessor; the longest of the\n"
        "three counts. Peaks are those of the SXM variants in the data sheets.\n\n" + table()
    )


def insert(page: Path, content: str) -> None:
    """Put the forecast between its marks in a page.

    Raises:
        ValueError: If the page lacks the marks.
    """
    before = page.read_text("utf-8")
    begin, end = MARKS
    if begin not in before or end not in before:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r} to put the forecast between.")
    head, rest = before.split(begin, 1)
    page.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}", "utf-8")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{ops.__name__}.{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="put the forecast into this page")
    arguments = parser.parse_args()
    if arguments.markdown:
        insert(arguments.markdown, text())
    else:
        print(text())


if __name__ == "__main__":
    main()
