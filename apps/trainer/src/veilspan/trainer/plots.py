"""Figures of a run, drawn from public quantities only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from veilspan.accounting.bounds import at_least, round_up

BLUE, ORANGE, INK, GREY = "#1f5a96", "#b4551d", "#1b2530", "#8a94a0"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "savefig.dpi": 160,
}

Point = tuple[float, float]


def plot_epsilon(path: Path, curve: Sequence[Point], *, budget: float, spent: Point) -> None:
    """Draw ε against the number of releases, with the budget as a line.

    Args:
        path: PNG file to write.
        curve: (releases, upper bound on ε) over the whole plan.
        budget: ε that the run may not exceed.
        spent: (releases, ε) so far, from the ledger.
    """
    with _figure(path) as axes:
        axes.plot(*_columns(curve), color=BLUE, label="by the plan")
        axes.axhline(budget, color=ORANGE, linestyle=(0, (5, 3)), linewidth=1.5)
        axes.annotate(
            f"budget ε = {at_least(budget, 4)}",
            (0.0, budget),
            xycoords=("axes fraction", "data"),
            xytext=(6, 5),
            textcoords="offset points",
            color=ORANGE,
        )
        axes.plot(*spent, "o", color=BLUE, markersize=7, label=f"spent: ε ≤ {round_up(spent[1])}")
        axes.set(title="Privacy spent", xlabel="noisy releases", ylabel="ε (upper bound)")
        axes.set_ylim(0, 1.15 * max(budget, spent[1]))
        axes.set_xlim(left=0)
        axes.legend(loc="lower right")


def plot_heldout(path: Path, curve: Sequence[Point]) -> None:
    """Draw the loss on public held-out records.

    Args:
        path: PNG file to write.
        curve: (step, mean loss in nats per token).
    """
    with _figure(path) as axes:
        axes.plot(*_columns(curve), color=BLUE, marker="o", markersize=4)
        axes.annotate(
            f"{curve[-1][1]:.3f}",
            curve[-1],
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=BLUE,
        )
        axes.set(title="Loss on held-out records", xlabel="step", ylabel="nats per token")
        axes.margins(y=0.15)


def plot_resources(path: Path, speed: Sequence[Point], memory: Sequence[Point]) -> None:
    """Draw throughput and, where there is any, peak memory beside it.

    Args:
        path: PNG file to write.
        speed: (step, tokens per second for the expected batch).
        memory: (step, peak GiB of one process).
    """
    panels = [
        ("Throughput", "tokens per second", speed, BLUE),
        ("Peak memory of one process", "GiB", memory, ORANGE),
    ]
    panels = [panel for panel in panels if panel[2]]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4 * len(panels), 3.6), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        figure.get_layout_engine().set(wspace=0.06)  # pyright: ignore
        for axes, (title, unit, points, color) in zip(row, panels, strict=True):
            axes.plot(*_columns(points), color=color, marker="o", markersize=4)
            axes.set(title=title, ylabel=unit, xlabel="step")
            axes.set_ylim(0, 1.25 * max(value for _, value in points))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path)


def draw_plots(
    folder: Path,
    rows: Sequence[Mapping[str, float]],
    *,
    epsilon: Sequence[Point],
    budget: float,
    spent: Point,
) -> dict[str, Path]:
    """Draw every figure for which there are numbers.

    Args:
        folder: Where the PNG files go; created if needed.
        rows: Public metrics, one row per step.
        epsilon: (releases, ε) over the whole plan.
        budget: ε that the run may not exceed.
        spent: (releases, ε) so far.

    Returns:
        Title of each figure and its file, in reading order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"Privacy spent": folder / "epsilon.png"}
    plot_epsilon(figures["Privacy spent"], epsilon, budget=budget, spent=spent)
    heldout = series(rows, "heldout_loss")
    speed, memory = series(rows, "tokens_per_second"), series(rows, "memory_gib")
    if heldout:
        figures["Held-out loss"] = folder / "heldout_loss.png"
        plot_heldout(figures["Held-out loss"], heldout)
    if speed:
        title = "Throughput and memory" if memory else "Throughput"
        figures[title] = folder / "resources.png"
        plot_resources(figures[title], speed, memory)
    return figures


def series(rows: Sequence[Mapping[str, float]], name: str) -> list[Point]:
    """Return (step, value) of one quantity, leaving out the rows that lack it."""
    return [(row["step"], row[name]) for row in rows if name in row]


@contextmanager
def _figure(path: Path) -> Iterator[Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        yield axes
        figure.savefig(path)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
