"""The benchmark's results as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per length and method."""
    head = f"{'T':>6} {'method':<20} {'s':>8} {'of plain':>9} {'quartiles':>14} {'of best':>8}"
    lines = [head, "-" * len(head)]
    for row in results:
        ratio, best = row["throughput_ratio"], row["best_ratio"]["median"]
        lines.append(
            f"{row['length']:>6} {row['method']:<20} {row['seconds']['median']:>8.2f} "
            f"{ratio['median']:>9.3f} {ratio['q1']:>6.3f} … {ratio['q3']:.3f} "
            f"{best:>8.3f}"
        )
    return "\n".join(lines)


def plot(results: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], path: Path) -> None:
    """Draw throughput relative to plain training, by length."""
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in results})
    names = list(dict.fromkeys(row["method"] for row in results))
    cell = {(row["length"], row["method"]): row for row in results}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        rows = [cell[length, name] for length in lengths]
        at = [i + (number - (len(names) - 1) / 2) * width for i in range(len(lengths))]
        ratios = [row["throughput_ratio"] for row in rows]
        middle = [ratio["median"] for ratio in ratios]
        spread = [
            [r["median"] - r["q1"] for r in ratios],
            [r["q3"] - r["median"] for r in ratios],
        ]
        axes.bar(at, middle, width, yerr=spread, label=name, capsize=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("throughput / plain training\n(same micro-batch; median, quartiles)")
    axes.set_xticks(range(len(lengths)), [f"T = {length}" for length in lengths])
    figure.legend(loc="outside lower center", ncols=min(4, len(names)))
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
