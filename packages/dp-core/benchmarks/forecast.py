"""What the cost model expects of a GPU that was not measured: a roofline, as a Markdown table.

    python forecast.py

Prints the table for the documentation; `--page docs/benchmarks.md` puts it between the marks there.
Nothing here is a measurement. The rates are those of a data sheet times an efficiency, both stated
in the text that is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import LLAMA_8B
from models import Shape
from report import insert

from veilspan.core.cost import ModelShape, forecast_all, norm_cost
from veilspan.core.rates import DeviceRates

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
STRATEGIES = ("single_sample", "per_layer", "bookkeeping", "two_pass")
BEGIN, END = "<!-- forecast: made by forecast.py --page -->", "<!-- forecast: end -->"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A data sheet, and how much of it programs reach.

    Args:
        flops: Dense bf16 operations per second.
        bandwidth: Bytes per second.
        products: Efficiency of matrix products.
        attention: Efficiency of attention.
        traffic: Efficiency of memory traffic.
        memory: Bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    products: float = 0.75
    attention: float = 0.5
    traffic: float = 0.9

    def rates(self) -> DeviceRates:
        """Return what the cost model takes for this device."""
        return DeviceRates(
            flops=self.products * self.flops,
            norm_flops=self.products * self.flops,
            bandwidth=self.traffic * self.bandwidth,
            reading=self.traffic * self.bandwidth,
            call_seconds=4e-6,
            free_bytes=int(self.memory),
        )


H100 = Sheet(name="H100 SXM", flops=989e12, bandwidth=3.35e12, memory=80e9)


def model_shape(shape: Shape) -> ModelShape:
    """Return what the cost model knows of a Llama in bf16."""
    kv = shape.hidden * shape.kv_heads // shape.heads
    block = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, kv)] * 2
    block += [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]
    linears = (*block * shape.layers, (shape.hidden, shape.vocabulary))
    table = shape.hidden * shape.vocabulary
    return ModelShape(
        linears=linears,
        parameters=sum(i * o for i, o in linears) + table,
        largest=table,
        features=sum(i + o for i, o in linears),
        layered=True,
        gradient_bytes=2.0,
    )


def plain_seconds(shape: Shape, sheet: Sheet) -> tuple[float, float]:
    """Return forward and backward of one record, and the traffic of its weight gradients.

    Elementwise work is left out, which flatters plain training, so ratios are on the low side.
    """
    model, rates = model_shape(shape), sheet.rates()
    products = 6.0 * shape.length * sum(i * o for i, o in model.linears) / rates.flops
    # Forward 2T²D, backward 5T²D: causal, with the scores computed again.
    attention = 7.0 * shape.layers * shape.length**2 * shape.hidden
    written = 8.0 * model.parameters / rates.bandwidth  # bf16 gradient, fp32 accumulation fused
    return products + attention / (sheet.attention * sheet.flops), written


def text(fields: dict[str, Any], sheet: Sheet) -> Iterator[str]:
    """Yield the lines of the table and of its assumptions."""
    rates = sheet.rates()
    yield (
        f"**A forecast, not a measurement.** {sheet.name}, bf16, one record a micro-batch. Rates: "
        f"{sheet.flops / 1e12:.0f} TFLOP/s dense at {sheet.products:.0%} for matrix products and "
        f"{sheet.attention:.0%} for attention, {sheet.bandwidth / 1e12:.2f} TB/s at "
        f"{sheet.traffic:.0%}. Plain training: 6 operations per weight and token, causal attention "
        "with recomputed scores, and 8 bytes of gradient traffic per parameter, which private "
        "training replaces by its own; elementwise work, noise and optimizer are on neither side. "
        "No activation checkpointing."
    )
    yield ""
    yield "| T | plain, s | " + " | ".join(f"`{name}`" for name in STRATEGIES) + " |"
    yield "| --- |" + " --- |" * (1 + len(STRATEGIES))
    for length in LENGTHS:
        shape = Shape(length=length, records=1, **fields)
        computed, written = plain_seconds(shape, sheet)
        forecasts = forecast_all(1, length, model_shape(shape), rates, norm_cost("auto", rates))
        seconds = {forecast.name: forecast.seconds for forecast in forecasts}
        plain = computed + written
        ratios = [f"{plain / (computed + seconds[name]):.3f}" for name in STRATEGIES]
        yield f"| {length:,} | {plain:.3f} | " + " | ".join(ratios) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    options = parser.parse_args()
    lines = "\n".join(text(LLAMA_8B, H100))
    if options.page:
        insert(lines, options.page, (BEGIN, END))
    else:
        print(lines)


if __name__ == "__main__":
    main()
