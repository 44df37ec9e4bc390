"""Checks of arguments that all audits share."""

from __future__ import annotations

from veilspan.accounting.mechanism import check_number


def check_confidence(value: object) -> None:
    """Raise `ValueError` unless `value` is a number above 1/2 and below 1."""
    if not 0.5 < check_number("confidence", value) < 1:
        raise ValueError(
            f"confidence is {value!r}; it must lie above 0.5 and below 1, as 0.95 does: it is one "
            "minus the chance of a false alarm."
        )
