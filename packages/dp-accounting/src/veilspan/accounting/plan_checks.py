"""What a privacy plan refuses, and the messages that say so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from veilspan.accounting.mechanism import RELATIONS, check_delta, check_number

if TYPE_CHECKING:
    from veilspan.accounting.plan import PrivacyPlan

_ALLOWED = {
    "sampling": ("poisson",),
    "relation": RELATIONS,
    "noise_stream": ("aes-ctr", "philox"),
}


def check_plan(plan: PrivacyPlan) -> None:
    """Raise `ValueError` that names the field, unless every field of the plan makes sense."""
    plan.mechanism(plan.steps)  # checks noise_multiplier, sampling_probability, steps
    if math.isinf(plan.noise_multiplier):
        raise ValueError("noise_multiplier is infinite; it must be finite.")
    check_delta(plan.delta)
    _check_clip_norm(plan)
    if plan.expected_batch_size is not None:
        check_number("expected_batch_size", plan.expected_batch_size)
        if not 0 < plan.expected_batch_size < math.inf:
            raise ValueError(
                f"expected_batch_size is {plan.expected_batch_size}; it must be above 0 and "
                "finite: sampling_probability × number of records, never a batch's own size."
            )
    if not isinstance(plan.unit, str) or not plan.unit.strip():
        raise ValueError(f"unit is {plan.unit!r}; name whose presence is hidden, as in 'record'.")
    for name, allowed in _ALLOWED.items():
        if getattr(plan, name) not in allowed:
            raise ValueError(_unknown(name, getattr(plan, name), allowed))


def _check_clip_norm(plan: PrivacyPlan) -> None:
    check_number("clip_norm", plan.clip_norm)
    if not plan.clip_norm > 0:
        raise ValueError(f"clip_norm is {plan.clip_norm}; it must be above 0.")
    if math.isinf(plan.clip_norm) and plan.noise_multiplier > 0:
        raise ValueError(
            "clip_norm is infinite, but noise_multiplier is not 0: noise in proportion to an "
            "infinite norm does not exist. Give a finite clip_norm, or noise_multiplier=0."
        )


def _unknown(name: str, value: object, allowed: tuple[str, ...]) -> str:
    way_out = {
        "sampling": "Shuffled or fixed-size batches have another ε and must not be counted so.",
        "relation": "The noise for replacing a record is not the noise for adding or removing one.",
        "noise_stream": "Name the stream that really draws the noise; the statement mentions it.",
    }
    choices = " or ".join(repr(choice) for choice in allowed)
    return f"{name} is {value!r}; supported is {choices}. {way_out[name]}"
