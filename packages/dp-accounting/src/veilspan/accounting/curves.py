"""The commands `delta` and `curve`: what one plan, made from options, answers besides its ε."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.bounds import at_most, round_up, round_up_short
from veilspan.accounting.plan import PrivacyPlan
from veilspan.accounting.plotting import epsilon_curve
from veilspan.accounting.sketched import SketchedClip

CURVES = ("tradeoff", "delta", "epsilon")
Answer = tuple[dict[str, Any], str]


def plan_of(options: argparse.Namespace) -> PrivacyPlan:
    """Return the plan that the options of a command describe."""
    return PrivacyPlan(
        noise_multiplier=options.noise_multiplier,
        sampling_probability=options.sampling_probability,
        steps=options.steps,
        delta=options.delta,
        relation=options.relation,
        sampling=options.sampling,
        batch_cap=options.batch_cap,
        most_records=options.most_records,
        norms=_norms(options),
        records_per_unit=options.records_per_unit,
    )


def add_norms(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the norms are estimated by which contributions are clipped."""
    parser.add_argument("--probes", type=int, metavar="K", help="norms are estimated from K probes")
    parser.add_argument("--blocks", type=int, metavar="B", help="of probes; default 1")
    parser.add_argument(
        "--probes-shared", action="store_true", help="the records of a step share their probes"
    )
    parser.add_argument("--norm-groups", type=int, metavar="M", help="clipped apart; default 1")


def norms_report(plan: PrivacyPlan) -> dict[str, Any]:
    """Return how norms are estimated, and how many records a unit holds if it may be several."""
    report: dict[str, Any] = {} if plan.norms is None else {"norms": asdict(plan.norms)}
    if plan.records_per_unit > 1:
        report["records_per_unit"] = plan.records_per_unit
    return report


def counted(plan: PrivacyPlan) -> str:
    """Return what lower bounds are about: the mechanism, or the law that stands for it."""
    return "exact" if plan.norms is None else "counted"


def _norms(options: argparse.Namespace) -> SketchedClip | None:
    blocks, groups = options.blocks, options.norm_groups
    if options.probes is not None:
        return SketchedClip(
            probes=options.probes,
            blocks=1 if blocks is None else blocks,
            probes_shared=options.probes_shared,
            groups=1 if groups is None else groups,
        )
    if options.probes_shared or blocks is not None or groups is not None:
        raise ValueError(
            "probes is missing: --blocks, --probes-shared and --norm-groups describe how norms are "
            "estimated from --probes. Leave all of them out for exact norms."
        )
    return None


def answer_delta(options: argparse.Namespace) -> Answer:
    """Answer `delta`: bounds on δ at an ε; the plan's own δ is not used."""
    plan = plan_of(options)
    bounds = plan.delta_at(options.epsilon)
    report = {
        "delta": bounds.upper,  # what may be reported
        "delta_lower": bounds.lower,
        "delta_estimate": bounds.estimate,
        "delta_upper": bounds.upper,
        "epsilon": bounds.epsilon,
        "direction": bounds.direction,
        "method": bounds.method,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "steps": plan.steps,
        "relation": plan.relation,
        **norms_report(plan),
    }
    least = f"{counted(plan)} δ is at least {at_most(bounds.lower, 4)}"
    return report, f"{bounds}\n{least}; method: {bounds.method}"


def answer_curve(options: argparse.Namespace) -> Answer:
    """Answer `curve`: points of the trade-off curve, of δ over ε, or of ε over steps."""
    if options.points < 2:
        raise ValueError(f"points is {options.points}; a curve needs at least 2.")
    plan = plan_of(options)
    if plan.noise_multiplier == 0:
        raise ValueError("noise_multiplier is 0, so ε is infinite and there is no curve.")
    if options.of != "tradeoff" and math.isinf(plan.epsilon().upper):
        raise ValueError("ε is infinite, so there is no curve; add noise or probes.")
    return {"tradeoff": _tradeoff, "delta": _delta, "epsilon": _epsilon}[options.of](
        plan, options.points
    )


def _tradeoff(plan: PrivacyPlan, points: int) -> Answer:
    rates = tuple(_as_printed(np.geomspace(1e-6, 0.5, points), 4))
    curve = plan.tradeoff()
    report = {"curve": "tradeoff", **curve.to_dict(rates), "advantage": curve.largest_advantage}
    rows = [
        f"{rate:<14.4g} {math.floor(error * 1e6) / 1e6:.6f}"  # rounded down: errors are at least
        for rate, error in zip(rates, report["type_two_error"], strict=True)
    ]
    head = "false alarms   misses, at least"
    foot = f"hits exceed false alarms by at most {round_up(curve.largest_advantage)}"
    return report, "\n".join([head, *rows, foot])


def _delta(plan: PrivacyPlan, points: int) -> Answer:
    largest = 1.5 * plan.epsilon().upper
    places = _as_printed(np.linspace(0, largest, points), 6)
    pairs = [(e, plan.delta_at(e).upper) for e in places]
    report = {"curve": "delta", "epsilon": [e for e, _ in pairs], "delta": [d for _, d in pairs]}
    rows = [f"{e:<14.6g} {round_up_short(d)}" for e, d in pairs]
    return report, "\n".join(["ε              δ, at most", *rows])


def _as_printed(places: NDArray[np.float64], digits: int) -> list[float]:
    """Return places with no more digits than are printed: a bound holds where it stands."""
    return [float(f"{place:.{digits}g}") for place in places]


def _epsilon(plan: PrivacyPlan, points: int) -> Answer:
    pairs = epsilon_curve(plan, points)
    report = {
        "curve": "epsilon",
        "delta": plan.delta,
        "steps": [steps for steps, _ in pairs],
        "epsilon": [epsilon for _, epsilon in pairs],
    }
    rows = [f"{steps:<14} {round_up(epsilon)}" for steps, epsilon in pairs]
    return report, "\n".join(["steps          ε, at most", *rows])
