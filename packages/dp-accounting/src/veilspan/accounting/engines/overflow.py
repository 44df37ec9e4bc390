"""Samples of fixed room: the chance that a sample is cut is charged to δ.

Let η be the chance that any step's sample is larger than its room. What is released then differs
from what Poisson sampling releases with probability at most η, on either of two neighbouring data
sets. If Poisson sampling is (ε, δ)-differentially private, cut sampling therefore is
(ε, δ + (1 + e^ε) η), and the other way round, whatever happens to the samples that are cut.

Source: Chua, Ghazi, Harrison, Leeman, Kamath, Kumar, Manurangsi, Sinha, Zhang (2024),
https://arxiv.org/abs/2411.04205.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scipy.special import bdtrc

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.mechanism import Composed, Mechanism

_MARGIN = 1e-6  # relative error allowed to the tail of the binomial distribution
_FEW = 10_000_000
_SMALLEST = 1e-300
_ROUNDS = 40
_LARGEST_EXPONENT = 700.0


def overflow_probability(records: int, probability: float, room: int) -> float:
    """Return an upper bound on the chance that more than `room` of `records` are sampled."""
    if room >= records or probability == 0:
        return 0.0
    if probability == 1:
        return 1.0
    return min(max(_tail(records, probability, room) * (1 + _MARGIN), _SMALLEST), 1.0)


def _tail(records: int, probability: float, room: int) -> float:
    """Return the chance that more than `room` of `records` are sampled, to a tenth of `_MARGIN`."""
    if records <= _FEW:
        return float(bdtrc(room, records, probability))
    # Of more records `bdtrc` loses digits, and from 2^31 on it counts others; this is slow to load.
    from scipy.stats import binom

    return float(binom.sf(room, records, probability))


def cut_probability(mechanism: Mechanism) -> float:
    """Return η: the chance, at most, that any sample of any phase is cut."""
    return min(sum(part.steps * part.overflow for part in mechanism.parts), 1.0)


def charged_epsilon(
    bound: Callable[[Mechanism, float], EpsilonBounds],
    mechanism: Mechanism,
    cut: float,
    delta: float,
) -> EpsilonBounds:
    """Return bounds on ε at `delta` from those without cuts.

    Looks for an ε that the bound at `δ - (1 + e^ε) η` does not exceed; any such ε holds.
    """
    uncut = _uncut(mechanism)
    found = bound(uncut, delta)
    epsilon, upper = found.upper, math.inf
    for _ in range(_ROUNDS):
        left = delta - _charge(epsilon, cut)
        if left <= 0:
            break
        found = bound(uncut, left)
        if found.upper <= epsilon:
            upper = epsilon
            break
        epsilon = found.upper + (found.upper - epsilon) / 2
    more = delta + _charge(upper, cut)
    lower = min(bound(uncut, more).lower, upper) if more < 1 else 0.0
    return EpsilonBounds(
        lower=lower,
        estimate=lower if math.isinf(upper) else (lower + upper) / 2,
        upper=upper,
        delta=delta,
        direction=found.direction,
        method=f"{found.method}, cut samples charged to δ",
    )


def charged_delta(
    bound: Callable[[Mechanism, float], DeltaBounds],
    mechanism: Mechanism,
    cut: float,
    epsilon: float,
) -> DeltaBounds:
    """Return bounds on δ at `epsilon` from those without cuts."""
    found, charge = bound(_uncut(mechanism), epsilon), _charge(epsilon, cut)
    lower, upper = max(found.lower - charge, 0.0), min(found.upper + charge, 1.0)
    return replace(
        found,
        lower=lower,
        estimate=(lower + upper) / 2,
        upper=upper,
        method=f"{found.method}, cut samples charged to δ",
    )


def _uncut(mechanism: Mechanism) -> Mechanism:
    return Composed(parts=tuple(replace(part, overflow=0.0) for part in mechanism.parts))


def _charge(epsilon: float, cut: float) -> float:
    return math.inf if epsilon > _LARGEST_EXPONENT else (1 + math.exp(epsilon)) * cut
