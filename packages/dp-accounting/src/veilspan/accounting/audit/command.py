"""The command `audit`: a measured lower bound against what a plan or ledger claims."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from veilspan.accounting.audit.one_run import OneRunAudit, audit_one_run
from veilspan.accounting.audit.plotting import check_exact_norms, plot_audit
from veilspan.accounting.audit.white_box import WhiteBoxAudit, audit_white_box
from veilspan.accounting.bounds import at_most
from veilspan.accounting.ledger import Ledger
from veilspan.accounting.plan import PrivacyPlan

_ONE_RUN = {"scores", "members"}
_WHITE_BOX = {"with_canary", "without_canary"}


def add_audit(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's commands and return its own parser."""
    parser = commands.add_parser("audit", help="hold a measured lower bound against a claim")
    parser.set_defaults(command=_audit)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="JSON or .npz with scores and members, or with_canary and without_canary",
    )
    claim = parser.add_mutually_exclusive_group(required=True)
    claim.add_argument("--plan", metavar="FILE", help="the claim, as PrivacyPlan.to_json wrote it")
    claim.add_argument("--ledger", metavar="FILE", help="the claim: a plan and its releases so far")
    parser.add_argument(
        "--guesses", type=_counts, metavar="R[,R]", help="of one run; fixed before looking"
    )
    parser.add_argument(
        "--family", choices=("any", "gaussian", "plan"), help="of one run; default any"
    )
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P")
    parser.add_argument("--plot", metavar="FILE", help="PNG, SVG or PDF to write")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from error


def _audit(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    claim = _claim(options)
    rows = _rows(Path(options.file))
    answer: Callable[..., Any] = _white_box if set(rows) == _WHITE_BOX else _one_run
    audit, measured, contradictions, verdict = answer(rows, claim, options)
    claimed = claim.epsilon()
    report = {
        "verdict": verdict,
        "contradictions": contradictions,
        "epsilon_claimed": claimed.upper,
        "epsilon_measured": measured,
        "delta": claim.delta,
        "releases": claim.steps,
        **asdict(audit),
    }
    lines = [
        f"claimed: {claimed}, after {claim.steps} releases",
        f"measured: ε ≥ {at_most(measured, 4)} with confidence {audit.confidence:g}",
        *contradictions,
        f"verdict: {verdict}",
    ]
    if options.plot is not None:
        lines.append(f"wrote {plot_audit(claim, audit, options.plot)}")
    return report, "\n".join(lines)


_Answer = tuple[Any, float, list[str], str]


def _white_box(rows: dict[str, Any], claim: PrivacyPlan, options: argparse.Namespace) -> _Answer:
    for name in ("guesses", "family"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} is for audits of one run; {options.file} holds repetitions of one step."
            )
    check_exact_norms(claim)
    audit: WhiteBoxAudit = audit_white_box(
        **rows, noise_multiplier=claim.noise_multiplier, confidence=options.confidence
    )
    measured = audit.epsilon_lower(
        claim.delta, sampling_probability=claim.sampling_probability, steps=claim.steps
    )
    found = list(audit.contradictions)
    if audit.verdict == "inconclusive":
        found.append(
            f"the canary contributes {audit.contribution:.3g} of "
            f"{audit.expected_contribution:.3g} clip norms: it does not reach the release"
        )
    return audit, measured, found, audit.verdict


def _one_run(rows: dict[str, Any], claim: PrivacyPlan, options: argparse.Namespace) -> _Answer:
    if options.guesses is None:
        raise ValueError("--guesses is missing; say how many, fixed before looking at the scores.")
    if options.family == "gaussian" and claim.sampling_probability < 1:
        raise ValueError(
            f"--family gaussian does not hold for sampling_probability="
            f"{claim.sampling_probability:g}; use --family plan, or any."
        )
    audit: OneRunAudit = audit_one_run(
        **rows,
        guesses=options.guesses,
        delta=claim.delta,
        confidence=options.confidence,
        family=claim if options.family == "plan" else options.family or "any",
    )
    found = []
    if audit.epsilon_lower > claim.epsilon().upper:
        found.append("the measured ε is above the claimed one")
    if audit.contradicts(claim):
        found.append(
            f"{audit.right} of {audit.guesses} guesses right is more than the claimed trade-off "
            "curve allows"
        )
    return audit, audit.epsilon_lower, found, "contradicted" if found else "consistent"


def _claim(options: argparse.Namespace) -> PrivacyPlan:
    """Return the plan, of as many steps as were released."""
    if options.ledger is None:
        return PrivacyPlan.from_json(Path(options.plan).read_text(encoding="utf-8"))
    with Ledger.open(options.ledger, read_only=True) as ledger:
        return replace(ledger.plan, steps=ledger.releases)


def _rows(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                rows = dict(arrays)
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not JSON, or not a .npz file of arrays: {error}") from error
    if not isinstance(rows, dict) or set(rows) not in (_ONE_RUN, _WHITE_BOX):
        found = sorted(rows) if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(
            f"{path} holds {found}; it must hold {sorted(_ONE_RUN)} of one run, or "
            f"{sorted(_WHITE_BOX)} of repetitions of one step."
        )
    return rows
