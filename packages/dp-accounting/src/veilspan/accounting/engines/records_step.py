"""One release of which a unit holds several records, each of them drawn by itself.

The number J of a unit's records in the sample is at most Bin(k, q) in the stochastic order, and the
norm of their sum at most J. So the pair of one release is that of a random shift which nobody sees:
it is j with the probability of Bin(k, q), and the chance that no record is drawn is (1 - q)^k. See
`docs/theory/randomized-clipping.md`, Section 16.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from veilspan.accounting.engines.norm_law import (
    Array,
    Atoms,
    Bound,
    FineLaw,
    Scale,
    collect,
    gather,
)
from veilspan.accounting.engines.one_step import LARGEST_LOSS, OneStep
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.shifts import HiddenShift
from veilspan.accounting.mechanism import SampledGaussian

_LARGEST_BOTTOM = 200.0  # losses down to minus this leave room for large ones in a double
_EXPONENT = 30.0
_NODES = np.linspace(-9.0, 9.0, 181)
_NEARLY_ALL = 1 - 1e-9  # chance of more records than a double has losses for


@lru_cache(maxsize=32)
def records_step(one: SampledGaussian, bound: Bound, atoms: int, tail: float) -> OneStep:
    """Return a pair that dominates a release with several records of a unit, or one below it.

    Args:
        one: The release, `0 < q < 1` and `0 < σ < ∞`.
        bound: Whether the number of records is rounded up ("upper") or down ("lower").
        atoms: Number of atoms of its law, about; no fewer than there are if these are few.
        tail: Probability that may count as an infinite loss.

    Raises:
        EngineError: If it is all but certain that a record is drawn, or that the loss is beyond the
            range of doubles.

    Guarantee:
        Above or below the pair of the number of records in both directions. An upper bound holds
        for all contributions of units, a lower bound for the worst: equal ones at the threshold.
    """
    k, sigma = one.records_per_unit, one.noise_multiplier
    bottom = k * math.log1p(-one.sampling_probability)
    if -bottom > _LARGEST_BOTTOM:
        raise EngineError(f"a unit is in nearly every sample: its chance not to be is e^{bottom:g}")
    q = -math.expm1(bottom)
    law = number_atoms(one, bound, atoms, tail)
    shift = HiddenShift(sigma, law)
    loss_scale = _loss_scale(q, bottom, shift, sigma) if law.beyond < _NEARLY_ALL else 0.0
    if loss_scale == 0:
        raise EngineError("the loss of so many records in a sample is beyond a double's range")
    return OneStep(one, shift, loss_scale)


def number_atoms(one: SampledGaussian, bound: Bound, atoms: int, tail: float) -> Atoms:
    """Return the law of the number of records in a sample that has one; arguments as above."""
    k, sigma = one.records_per_unit, one.noise_multiplier
    bottom = k * math.log1p(-one.sampling_probability)
    q = -math.expm1(bottom)
    chance = number_law(k, one.sampling_probability)[1:] / q
    passed = np.append(np.cumsum(chance[::-1])[::-1][1:], 0.0)  # of more than 1, 2, … records
    # A shift s has losses of about s²/(2σ²).
    enough = np.flatnonzero(passed <= tail / q)
    last = min(int(enough[0]), math.ceil(1 + sigma * (2 * LARGEST_LOSS) ** 0.5), k - 1)
    scale = Scale(sigma=sigma, largest=math.inf, tail=tail / q * min(1.0, math.exp(bottom) / q))
    return _atoms(chance[: last + 1], float(passed[last]), (bound, atoms), scale)


def number_law(k: int, q: float) -> Array:
    """Return the probabilities of 0 to k under Bin(k, q), with `(1 - q)^k` above 1e-300.

    The relative error of entry j is at most j + |log (1 - q)^k| times a few times 1e-16.
    """
    number = np.arange(k, dtype=np.float64)
    ratio = (k - number) / (number + 1) * (q / (1 - q))
    first = math.exp(k * math.log1p(-q))
    with np.errstate(under="ignore"):
        return np.cumprod(np.append(first, ratio), dtype=np.float64)


def _atoms(chance: Array, beyond: float, size: tuple[Bound, int], scale: Scale) -> Atoms:
    """Return the law of 1, 2, … records from their chances and that of more."""
    bound, count = size
    number = np.arange(1, len(chance) + 1, dtype=np.float64)
    if bound == "lower":
        chance = np.append(chance[:-1], chance[-1] + beyond)
        beyond = 0.0
    law = collect(number, [chance], beyond=beyond, tail=scale.tail)
    if len(law.size) <= max(count, 2):
        return law
    fine = FineLaw(
        size=law.size,
        mass=law.weight[1:],
        place=law.size[1:],
        at_first=float(law.weight[0]),
        beyond=law.beyond if bound == "upper" else 0.0,
    )
    return gather(fine, bound, count=count, scale=scale)


def _loss_scale(q: float, bottom: float, shift: HiddenShift, sigma: float) -> float:
    """Return about the standard deviation of the loss under Q."""
    growth = shift.growth_at(sigma * _NODES)
    small = np.log1p(q * np.expm1(np.minimum(growth, _EXPONENT))) if q < 0.5 else growth
    loss = np.where(
        (growth < _EXPONENT) & (q < 0.5), small, np.logaddexp(bottom, math.log(q) + growth)
    )
    weight = np.exp(-np.square(_NODES) / 2)
    mean = np.average(loss, weights=weight)
    return math.sqrt(float(np.average(np.square(loss - mean), weights=weight)))
