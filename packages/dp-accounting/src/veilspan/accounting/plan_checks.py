"""What a privacy plan refuses, and the messages that say so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from veilspan.accounting.bounds import at_least
from veilspan.accounting.mechanism import (
    RELATIONS,
    SampledGaussian,
    check_count,
    check_delta,
    check_number,
)

if TYPE_CHECKING:
    from veilspan.accounting.plan import PrivacyPlan

SAMPLINGS = ("poisson", "truncated_poisson", "without_replacement", "full_batch")
_LEAST_NOISE, _MOST_NOISE = 1e-60, 1e60  # squares stay in the range of a double
_ALLOWED = {
    "sampling": SAMPLINGS,
    "relation": RELATIONS,
    "noise_stream": ("aes-ctr", "chacha20", "philox"),
}


def check_plan(plan: PrivacyPlan) -> None:
    """Raise `ValueError` that names the field, unless every field of the plan makes sense."""
    check_mechanism(plan)
    if math.isinf(plan.noise_multiplier):
        raise ValueError("noise_multiplier is infinite; it must be finite.")
    if plan.noise_multiplier != 0 and not _LEAST_NOISE <= plan.noise_multiplier <= _MOST_NOISE:
        raise ValueError(
            f"noise_multiplier is {plan.noise_multiplier}; where it is not 0 it must lie from "
            f"{_LEAST_NOISE:g} to {_MOST_NOISE:g}."
        )
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
    _check_sampling(plan)


def check_fields(found: set[str], known: set[str]) -> None:
    """Raise `ValueError` unless these are the fields of a plan, all that it cannot do without."""
    missing = {"noise_multiplier", "sampling_probability", "steps", "delta"} - found
    if found - known or missing:
        raise ValueError(
            f"privacy plan has unknown fields {sorted(found - known)} and lacks "
            f"{sorted(missing)}; known fields are {sorted(known)}."
        )


def _check_sampling(plan: PrivacyPlan) -> None:
    if plan.sampling == "full_batch" and plan.sampling_probability != 1:
        raise ValueError(
            f"sampling_probability is {plan.sampling_probability}; with sampling='full_batch' it "
            "must be 1, as every record is in every step."
        )
    room = {"batch_cap": plan.batch_cap, "most_records": plan.most_records}
    if plan.sampling != "truncated_poisson":
        for name, value in room.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, but sampling is {plan.sampling!r}; leave it None, or use "
                    "sampling='truncated_poisson'."
                )
        return
    for name, value in room.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} is {value!r}; sampling='truncated_poisson' needs a whole number above 0: "
                "the most records that a step processes, and the most that the data set may hold."
            )
        check_count(name, value)
    if not plan.cut_probability * 2 < plan.delta:
        raise ValueError(
            f"batch_cap is {plan.batch_cap}: with at most {plan.most_records} records some step "
            f"would cut its sample with probability up to {at_least(plan.cut_probability, 2)}, too "
            f"often for delta={plan.delta:g}. Raise batch_cap, to about 1.2 times the expected "
            "batch size or more."
        )


def check_mechanism(plan: PrivacyPlan) -> None:
    """Raise `ValueError` unless noise, sampling, steps, relation, norms and records make sense."""
    SampledGaussian(
        noise_multiplier=plan.noise_multiplier,
        sampling_probability=plan.sampling_probability,
        steps=plan.steps,
        relation=plan.relation,
        norms=plan.norms,
        records_per_unit=plan.records_per_unit,
        sampling=draws(plan),
    )


def draws(plan: PrivacyPlan) -> str:
    """Return how the engines are told that samples are drawn; cuts they are told apart."""
    return plan.sampling if plan.sampling == "without_replacement" else "poisson"


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
        "sampling": (
            "Batches of a shuffled order have another ε, for which nothing is certified here, and "
            "must not be counted so."
        ),
        "relation": "The noise for replacing a record is not the noise for adding or removing one.",
        "noise_stream": "Name the stream that really draws the noise; the statement mentions it.",
    }
    choices = " or ".join(repr(choice) for choice in allowed)
    return f"{name} is {value!r}; supported is {choices}. {way_out[name]}"
