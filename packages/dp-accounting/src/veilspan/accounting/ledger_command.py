"""The command `ledger`: what one run has spent, or several on the same data together."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from veilspan.accounting.ledger import Ledger
from veilspan.accounting.phases import Phases

Answer = tuple[dict[str, Any], str]


def add_ledger(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.set_defaults(command=answer_ledger)
    parser.add_argument("file", metavar="FILE", nargs="+")
    parser.add_argument(
        "--same-data",
        action="store_true",
        help="sum up ledgers that do not name their data: their runs saw the same",
    )
    parser.add_argument(
        "--delta", type=float, metavar="DELTA", help="δ of the sum, where the plans differ in it"
    )


def answer_ledger(options: argparse.Namespace) -> Answer:
    """Answer `ledger` for one file, or for the sum of several."""
    if len(options.file) == 1:
        if options.delta is not None:
            raise ValueError("delta is for sums; one ledger answers at its plan's own δ.")
        with Ledger.open(options.file[0], read_only=True) as ledger:
            return _one(ledger)
    with ExitStack() as stack:
        ledgers = [stack.enter_context(Ledger.open(f, read_only=True)) for f in options.file]
        phases = Phases.from_ledgers(ledgers, delta=options.delta)
        unnamed = [str(ledger.path) for ledger in ledgers if ledger.data is None]
        if unnamed and not options.same_data:
            raise ValueError(
                f"{', '.join(unnamed)} of {len(ledgers)} ledgers name no data set. If all runs saw "
                "the same data, add --same-data and they are summed up. If no unit is in more than "
                "one of the data sets, no sum is needed: each ε holds for its own data; ask for "
                "the ledgers one by one."
            )
        return _sum(ledgers, phases)


def _one(ledger: Ledger) -> Answer:
    spent, most = ledger.spent(), ledger.most_releases
    left = None if most is None else max(most - ledger.releases, 0)
    report = {
        "run_id": ledger.run_id,
        "data": ledger.data,
        "releases": ledger.releases,
        "torn_lines": sum(entry.torn for entry in ledger.entries),
        "epsilon": spent.upper,
        "epsilon_lower": spent.lower,
        "epsilon_estimate": spent.estimate,
        "epsilon_upper": spent.upper,
        "delta": spent.delta,
        "budget_epsilon": ledger.budget_epsilon,
        "most_releases": most,
        "releases_left": left,
        "plan": ledger.plan.to_dict(),
        "plan_digest": ledger.plan.digest,
    }
    budget = (
        "no budget"
        if ledger.budget_epsilon is None
        else f"budget ε = {ledger.budget_epsilon:g}, in all {most} releases, {left} left"
    )
    text = (
        f"run {report['run_id']}: {report['releases']} releases "
        f"({report['torn_lines']} torn lines counted), chain intact\nspent {spent}; {budget}"
    )
    return report, text


def _sum(ledgers: list[Ledger], phases: Phases) -> Answer:
    spent = phases.epsilon()
    runs = [
        {"run_id": ledger.run_id, "releases": ledger.releases, "plan_digest": ledger.plan.digest}
        for ledger in ledgers
    ]
    report = {
        "runs": runs,
        "releases": sum(ledger.releases for ledger in ledgers),
        "epsilon": spent.upper,
        "epsilon_lower": spent.lower,
        "epsilon_estimate": spent.estimate,
        "epsilon_upper": spent.upper,
        "delta": spent.delta,
        "method": spent.method,
        "unit": phases.plans[0].unit,
        "relation": phases.plans[0].relation,
    }
    lines = [f"run {ledger.run_id}: {ledger.releases} releases, chain intact" for ledger in ledgers]
    return report, "\n".join([*lines, f"spent on the same data, all runs together: {spent}"])
