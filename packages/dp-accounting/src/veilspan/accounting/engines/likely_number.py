"""Bounds for units of several records as if samples were never larger than they likely are.

Let a unit have more than j records in a sample with probability at most τ ≤ 1/2, and let c be the
sum of τ over all steps. In the stochastic order the number of records is at most j with probability
1 - τ, and infinite otherwise. Removing the unit then costs what a shift of j without sampling does,
and c in δ; adding it costs the same, and -log(1 - τ) ≤ 2τ in ε at every step.
"""

from __future__ import annotations

import math

from veilspan.accounting.engines.closed_form import (
    SMALLEST_DELTA,
    gaussian_delta,
    gaussian_upper,
    live_parts,
    several_records,
)
from veilspan.accounting.engines.overflow import overflow_probability
from veilspan.accounting.mechanism import Mechanism, SampledGaussian

_SHARES = (1e-2, 1e-4, 1e-6)  # c against δ
_CHANCES = tuple(10.0**-power for power in (3, 6, 9, 12, 16, 20, 30, 50, 100))  # c
_MARGIN = 1e-10


def likely_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Return an upper bound on ε at `delta`; infinite unless a unit may hold several records.

    Guarantee:
        As in the module, for any number of phases with exact norms.
    """
    if not several_records(mechanism):
        return math.inf
    parts = live_parts(mechanism)
    return min(
        gaussian_upper(_distance(parts, share * delta), (1 - share) * delta * (1 - _MARGIN))
        + 2 * share * delta
        for share in _SHARES
    )


def likely_delta(mechanism: Mechanism, epsilon: float) -> float:
    """Return an upper bound on δ at `epsilon`; 1 unless a unit may hold several records."""
    if not several_records(mechanism):
        return 1.0
    parts = live_parts(mechanism)
    found = (
        gaussian_delta(max(epsilon - 2 * chance, 0.0), _distance(parts, chance), +1) + chance
        for chance in _CHANCES
    )
    return min(max(min(found), SMALLEST_DELTA), 1.0)


def _distance(parts: tuple[SampledGaussian, ...], chance: float) -> float:
    """Return the distance of the means over the noise unless what has this chance happens."""
    if any(part.norms is not None for part in parts):
        return math.inf
    share = chance / len(parts)
    return math.sqrt(
        sum(
            part.steps * (_most_likely(part, share / part.steps) / part.noise_multiplier) ** 2
            for part in parts
        )
    )


def _most_likely(part: SampledGaussian, chance: float) -> int:
    """Return a number of records that a sample exceeds with at most this chance; at least 1."""
    k, q = part.records_per_unit, part.sampling_probability
    low, high = 0, k
    while high - low > 1:
        middle = (low + high) // 2
        enough = overflow_probability(k, q, middle) <= chance
        low, high = (low, middle) if enough else (middle, high)
    return high
