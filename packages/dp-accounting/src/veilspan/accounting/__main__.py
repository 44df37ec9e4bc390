"""Accounting on the command line: `python -m veilspan.accounting`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NoReturn

from veilspan.accounting.audit.command import add_audit
from veilspan.accounting.bounds import at_least, at_most, round_up
from veilspan.accounting.calibration import find_noise
from veilspan.accounting.chain import LedgerError
from veilspan.accounting.curves import (
    CURVES,
    add_norms,
    answer_curve,
    answer_delta,
    counted,
    norms_report,
    plan_of,
)
from veilspan.accounting.engines import (
    CertifiedEngine,
    Engine,
    EngineError,
    PldEngine,
    RdpEngine,
)
from veilspan.accounting.ledger_command import add_ledger
from veilspan.accounting.mechanism import RELATIONS
from veilspan.accounting.plan_checks import SAMPLINGS
from veilspan.accounting.plotting import plot_epsilon

_ENGINES = ("certified", "pld", "prv", "rdp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, or 1 where an audit is not consistent with the claim, or 2 after one line on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        report, text = options.command(options)
    except (ValueError, LedgerError, EngineError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        json.dumps(_finite(report), ensure_ascii=False, allow_nan=False) if options.json else text
    )
    return int(report.get("verdict", "consistent") != "consistent")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line instead of the whole usage."""
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m veilspan.accounting", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    epsilon = commands.add_parser("epsilon", help="ε of a number of steps with given noise")
    epsilon.set_defaults(command=_epsilon)
    _add_noise(epsilon)
    _add_sampling(epsilon)
    epsilon.add_argument("--engine", choices=_ENGINES, default="certified")

    delta = commands.add_parser("delta", help="δ of a number of steps at a given ε")
    delta.set_defaults(command=answer_delta)
    delta.add_argument("--epsilon", type=_number, required=True, metavar="EPS")

    curve = commands.add_parser(
        "curve", help="points of a curve: errors, δ over ε, or ε over steps"
    )
    curve.set_defaults(command=answer_curve)
    curve.add_argument("--of", choices=CURVES, default="tradeoff")
    curve.add_argument("--points", type=int, default=12, metavar="N")
    for command in (delta, curve):
        _add_noise(command)
        _add_sampling(command)

    noise = commands.add_parser("noise", help="least noise multiplier that keeps a target ε")
    noise.set_defaults(command=_noise)
    noise.add_argument("--target-epsilon", type=_number, required=True, metavar="EPS")
    _add_sampling(noise)

    plot = commands.add_parser("plot", help="picture of ε over steps")
    plot.set_defaults(command=_plot)
    _add_noise(plot)
    _add_sampling(plot)
    plot.add_argument("--output", required=True, metavar="FILE", help="PNG, SVG or PDF to write")
    plot.add_argument("--budget-epsilon", type=_number, metavar="EPS", help="line to draw")

    ledger = commands.add_parser("ledger", help="verify ledgers and say what they have spent")
    add_ledger(ledger)

    audit = add_audit(commands)
    for command in (epsilon, delta, curve, noise, plot, ledger, audit):
        command.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--noise-multiplier", type=_number, required=True, metavar="SIGMA")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sampling-probability", type=_number, required=True, metavar="Q", help="0.001 or 1/1000"
    )
    parser.add_argument("--steps", type=int, required=True, metavar="T")
    parser.add_argument("--delta", type=_number, required=True, metavar="DELTA")
    parser.add_argument("--relation", choices=RELATIONS, default="add_remove")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="poisson")
    parser.add_argument("--batch-cap", type=int, metavar="B", help="for truncated_poisson")
    parser.add_argument("--most-records", type=int, metavar="N", help="for truncated_poisson")
    parser.add_argument(
        "--records-per-unit", type=int, default=1, metavar="K", help="most of one unit; default 1"
    )
    add_norms(parser)


def _number(text: str) -> float:
    """Read a number or a fraction such as 1/512."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def _epsilon(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    plan = plan_of(options)
    bounds = plan.epsilon(engine=_engine(options.engine))
    report = {
        "epsilon": bounds.upper,  # what may be reported
        "epsilon_lower": bounds.lower,
        "epsilon_estimate": bounds.estimate,
        "epsilon_upper": bounds.upper,
        "delta": bounds.delta,
        "direction": bounds.direction,
        "method": bounds.method,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "steps": plan.steps,
        "relation": plan.relation,
        "sampling": plan.sampling,
        **norms_report(plan),
    }
    least = f"{counted(plan)} ε is at least {at_most(bounds.lower)}"
    text = f"{bounds}\n{least}; method: {bounds.method}"
    return report, text


def _engine(name: str) -> Engine:
    if name == "prv":  # imported only where it is asked for, as it is slow to import
        from veilspan.accounting.engines.prv import PrvEngine

        return PrvEngine()
    return {"certified": CertifiedEngine, "pld": PldEngine, "rdp": RdpEngine}[name]()


def _noise(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    options.noise_multiplier = 1.0  # any, to describe the rest of the plan
    draft = plan_of(options)
    bracket = find_noise(draft.mechanism(draft.steps), options.target_epsilon, draft.delta)
    report = {
        "noise_multiplier": bracket.noise_multiplier,
        "noise_multiplier_too_small": bracket.too_small,
        "epsilon": bracket.epsilon,
        "target_epsilon": options.target_epsilon,
        "delta": options.delta,
        "sampling_probability": options.sampling_probability,
        "steps": options.steps,
        "relation": options.relation,
        "sampling": options.sampling,
        **norms_report(draft),
    }
    text = (
        f"noise multiplier {round_up(bracket.noise_multiplier, 6)}\n"
        f"ε ≤ {round_up(bracket.epsilon)} at δ = {at_least(options.delta)}"
    )
    return report, text


def _plot(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    plan = plan_of(options)
    path = plot_epsilon(plan, options.output, budget_epsilon=options.budget_epsilon)
    return {"file": str(path)}, f"wrote {path}"


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """Write infinities as text, which JSON has no number for."""
    return {
        name: str(value) if isinstance(value, float) and math.isinf(value) else value
        for name, value in report.items()
    }


if __name__ == "__main__":
    sys.exit(main())
