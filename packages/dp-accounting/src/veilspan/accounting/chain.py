"""The ledger's lines: hash-chained JSON, read so that damage never lowers the count."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from veilspan.accounting.mechanism import check_number
from veilspan.accounting.plan import PrivacyPlan

SCHEMA = "veilspan.accounting.ledger/1"


class LedgerError(RuntimeError):
    """The ledger is damaged, belongs to another run, or could not be written.

    Training must stop: a release that is not in the ledger would be spent without being counted.
    """


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One spent release.

    Args:
        step: Step of the training run; `None` for a torn line.
        attempt: Which attempt at the step, from 0; `None` for a torn line.
        day: Day on which it was recorded, UTC, ISO 8601; `None` for a torn line.
    """

    step: int | None
    attempt: int | None
    day: str | None

    @property
    def torn(self) -> bool:
        """Return whether the line broke off; it counts as spent, as nobody knows better."""
        return self.step is None


@dataclass(frozen=True, kw_only=True)
class Header:
    """First line of a ledger: whose releases it counts, and of which data.

    Raises:
        ValueError: If the budget is no number above 0, or a name is no text, or that of the data
            is empty.
    """

    run_id: str
    data: str | None
    plan: PrivacyPlan
    budget_epsilon: float | None
    created: str
    nonce: str  # random: no two ledgers begin alike, even of one run and in one second

    def __post_init__(self) -> None:
        for name in ("run_id", "created", "nonce"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be text.")
        if self.data is not None and not (isinstance(self.data, str) and self.data.strip()):
            raise ValueError(f"data is {self.data!r}; give the data set a name, or None.")
        if self.budget_epsilon is None:
            return
        budget = check_number("budget_epsilon", self.budget_epsilon)
        if not 0 < budget < math.inf:
            raise ValueError(
                f"budget_epsilon is {self.budget_epsilon}; it must be above 0 and finite, "
                "or None for no limit."
            )
        object.__setattr__(self, "budget_epsilon", float(budget))

    def to_line(self) -> bytes:
        """Return the header as a line of the file."""
        return _line(
            {
                "schema": SCHEMA,
                "run_id": self.run_id,
                "data": self.data,
                "plan": self.plan.to_dict(),
                "plan_digest": self.plan.digest,
                "budget_epsilon": self.budget_epsilon,
                "created": self.created,
                "nonce": self.nonce,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a ledger file of `size` bytes holds; `tail` is the digest the next line must carry."""

    header: Header
    entries: tuple[LedgerEntry, ...]
    tail: str
    ends_torn: bool
    size: int


def entry_line(entry: LedgerEntry, number: int, previous: str) -> bytes:
    """Return an entry as a line of the file; `number` counts releases from 1."""
    return _line(
        {
            "number": number,
            "step": entry.step,
            "attempt": entry.attempt,
            "day": entry.day,
            "previous": previous,
        }
    )


def digest(line: bytes) -> str:
    """Return the SHA-256 of a line without its line end."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def read(raw: bytes, name: str) -> Contents:
    """Read a ledger file's bytes and check every link of the chain.

    Args:
        raw: The whole file.
        name: What to call the file in messages.

    Raises:
        LedgerError: If the header is missing or damaged, or a link of the chain does not fit.

    Guarantee:
        Every line after the header counts as one release, also one that cannot be read, unless it
        may be what is left of several: then it is refused, as is a line that was changed, removed
        or inserted before the last. What the chain cannot show, a removed end, is caught by
        `Ledger.require_at_least`.
    """
    lines = raw.split(b"\n")
    ends_torn = lines[-1] != b""
    if not ends_torn:
        lines.pop()
    if not lines or (len(lines) == 1 and ends_torn):
        raise LedgerError(
            f"{name} has no complete header: its creation was interrupted, so nothing was ever "
            "recorded or released under it. Delete it and create it again."
        )
    header = _read_header(lines[0], name)
    previous, entries = digest(lines[0]), []
    for number, line in enumerate(lines[1:], start=1):
        entries.append(_read_entry(line, number, previous, name))
        previous = digest(line)
    return Contents(
        header=header,
        entries=tuple(entries),
        tail=previous,
        ends_torn=ends_torn,
        size=len(raw),
    )


def require_same(header: Header, plan: PrivacyPlan | None, run_id: str | None, name: str) -> None:
    """Refuse a ledger of another run or plan than the caller's, where those are given.

    Raises:
        LedgerError: If run or plan differ; it names what differs.
    """
    if run_id is not None and run_id != header.run_id:
        raise LedgerError(
            f"{name} belongs to run {header.run_id!r}, not to {run_id!r}. Give every run a folder "
            "of its own."
        )
    if plan is None or plan == header.plan:
        return
    theirs, ours = header.plan.to_dict(), plan.to_dict()
    changed = ", ".join(
        f"{key} {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted(theirs | ours)
        if theirs.get(key) != ours.get(key)
    )
    raise LedgerError(
        f"{name} was made for another plan: {changed}. Continue with the plan in the ledger, or "
        "start a new run with a ledger of its own."
    )


def _read_header(line: bytes, name: str) -> Header:
    fields = _parse(line)
    if fields is None or fields.get("schema") != SCHEMA:
        found = None if fields is None else fields.get("schema")
        raise LedgerError(
            f"{name} is not a ledger this version reads: its first line has schema {found!r}, "
            f"expected {SCHEMA!r}."
        )
    try:
        plan = PrivacyPlan.from_dict(fields["plan"])
        header = Header(
            run_id=fields["run_id"],
            data=fields.get("data"),  # ledgers of version 0.1.0 have neither this nor a nonce
            plan=plan,
            budget_epsilon=fields["budget_epsilon"],
            created=fields["created"],
            nonce=fields.get("nonce", ""),
        )
    except (KeyError, ValueError) as error:
        raise LedgerError(f"{name} has a damaged header: {error}.") from error
    if fields.get("plan_digest") != plan.digest:
        raise LedgerError(f"{name} was altered: the plan in its header does not match its digest.")
    return header


def _read_entry(line: bytes, number: int, previous: str, name: str) -> LedgerEntry:
    fields = _parse(line)
    if fields is None:  # torn by a crash; its bytes are still held by the next line's link
        if len(line) + 1 >= 2 * _SHORTEST or line.count(b"{") > 1:
            raise LedgerError(
                f"{name} was altered: line {number + 1} cannot be read, and holds more than one "
                "release may have left behind. Restore the file from a backup; without the true "
                "count no ε can be stated."
            )
        return LedgerEntry(step=None, attempt=None, day=None)
    if fields.get("previous") != previous or fields.get("number") != number:
        raise LedgerError(
            f"{name} was altered: line {number + 1} does not continue the line before it. A line "
            "was changed, removed or inserted. Restore the file from a backup; without the true "
            "count no ε can be stated."
        )
    step, attempt = fields.get("step"), fields.get("attempt")
    if not isinstance(step, int) or not isinstance(attempt, int):
        raise LedgerError(f"{name}: line {number + 1} names no step and attempt.")
    return LedgerEntry(step=step, attempt=attempt, day=fields.get("day"))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # also covers broken UTF-8
        return None
    return fields if isinstance(fields, dict) else None


def _line(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return text.encode() + b"\n"


# No line of an entry has fewer bytes, its end included.
_SHORTEST = len(entry_line(LedgerEntry(step=0, attempt=0, day="2026-01-01"), 1, "0" * 64))
