"""A picture of ε over the steps of a plan."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from veilspan.accounting.bounds import round_up
from veilspan.accounting.engines import CertifiedEngine, PldEngine
from veilspan.accounting.plan import PrivacyPlan

_POINTS = 40


def epsilon_curve(plan: PrivacyPlan, points: int = _POINTS) -> list[tuple[int, float]]:
    """Return pairs of step count and upper bound on ε, from one step to the plan's last.

    Args:
        plan: The plan; its δ applies throughout.
        points: How many pairs at most; dense at the start, where ε rises fastest.
    """
    engine = CertifiedEngine(pld=PldEngine(one_sided=True))
    last = max(plan.steps, 1)
    counts = np.unique(np.rint(np.linspace(1, last**0.5, points) ** 2).astype(int)).tolist()
    return [(steps, plan.epsilon_after(steps, engine=engine).upper) for steps in counts]


def plot_epsilon(
    plan: PrivacyPlan, path: str | os.PathLike[str], *, budget_epsilon: float | None = None
) -> Path:
    """Draw ε over steps, with the budget as a line, and write it as PNG, SVG or PDF.

    Args:
        plan: The plan to draw.
        path: File to write; its ending names the format.
        budget_epsilon: Where to draw the budget; none unless given.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If ε is infinite, so that there is nothing to draw, or the format is unknown.
    """
    figure = figure_class()(figsize=(7.0, 4.2), layout="constrained")
    if plan.noise_multiplier == 0:
        raise ValueError("noise_multiplier is 0, so ε is infinite and there is nothing to plot.")
    steps, epsilon = zip(*epsilon_curve(plan), strict=True)
    if math.isinf(max(epsilon)):
        raise ValueError("ε is infinite, so there is nothing to plot; add noise or probes.")
    axes = figure.add_subplot()
    axes.plot(steps, epsilon, color="#1f4e79", linewidth=2, label="ε, upper bound")
    if budget_epsilon is not None:
        axes.axhline(budget_epsilon, color="#b03a2e", linestyle="--", label="budget")
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"ε at δ = {plan.delta:g}")
    axes.set_title(
        f"σ = {plan.noise_multiplier:.4g}, q = {plan.sampling_probability:.4g}, "
        f"{plan.steps:,} steps: ε ≤ {round_up(epsilon[-1])}"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def figure_class() -> Any:
    """Return matplotlib's `Figure`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib: pip install 'veilspan-accounting[plot]'."
        ) from error
    return Figure
