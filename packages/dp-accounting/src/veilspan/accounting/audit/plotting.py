"""A picture of a claimed upper bound on ε and a measured lower one."""

from __future__ import annotations

import os
from pathlib import Path

from veilspan.accounting.audit.one_run import OneRunAudit
from veilspan.accounting.audit.white_box import WhiteBoxAudit
from veilspan.accounting.plan import PrivacyPlan
from veilspan.accounting.plotting import epsilon_curve, figure_class

_POINTS = 24


def plot_audit(
    plan: PrivacyPlan, audit: WhiteBoxAudit | OneRunAudit, path: str | os.PathLike[str]
) -> Path:
    """Draw claimed and measured ε over the steps of a plan, and write it as PNG, SVG or PDF.

    Repetitions of one step give a line, which takes the plan's sampling for granted; one run gives
    a point at its end. The truth lies between the two, if the claim is true.

    Args:
        plan: The claim.
        audit: The measurement.
        path: File to write; its ending names the format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the claimed ε is infinite, the format is unknown, or repetitions of one step
            are held against a plan with estimated norms.
    """
    figure = figure_class()(figsize=(7.0, 4.2), layout="constrained")
    if plan.noise_multiplier == 0:
        raise ValueError("noise_multiplier is 0, so ε is infinite and there is nothing to plot.")
    steps, claimed = zip(*epsilon_curve(plan, _POINTS), strict=True)
    axes = figure.add_subplot()
    axes.plot(steps, claimed, color="#1f4e79", linewidth=2, label="claimed: ε at most")
    label = f"measured: ε at least, confidence {audit.confidence:g}"
    if isinstance(audit, WhiteBoxAudit):
        check_exact_norms(plan)
        q = plan.sampling_probability
        measured = [
            audit.epsilon_lower(plan.delta, sampling_probability=q, steps=count) for count in steps
        ]
        axes.plot(steps, measured, color="#b03a2e", linewidth=2, linestyle="--", label=label)
    else:
        end = [plan.steps], [audit.epsilon_lower]
        axes.plot(*end, color="#b03a2e", marker="^", linestyle="none", label=label, clip_on=False)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"ε at δ = {plan.delta:g}")
    axes.set_title("claimed upper bound against measured lower bound")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", frameon=False)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def check_exact_norms(plan: PrivacyPlan) -> None:
    """Refuse to hold repetitions of one step against a plan whose contributions vary.

    Raises:
        ValueError: If the plan's norms are estimated.
    """
    if plan.norms is not None:
        raise ValueError(
            "norms are estimated in the plan, so that contributions vary from step to step, but "
            "repetitions of one step are tested for contributions of at most the clip norm. Audit "
            "whole runs or one run, or repeat the step with exact norms (norms=None)."
        )
