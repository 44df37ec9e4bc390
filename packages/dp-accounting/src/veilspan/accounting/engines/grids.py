"""Grids with the loss of one release of a phase, kept for other questions about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from veilspan.accounting.engines.condensed import Bound
from veilspan.accounting.engines.discretise import GridLoss, Search, dominated, dominating
from veilspan.accounting.engines.mirrored import MirroredStep
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.engines.records_step import records_step
from veilspan.accounting.engines.sketched_step import sketched_step
from veilspan.accounting.engines.symmetric import SymmetricStep
from veilspan.accounting.mechanism import SampledGaussian

OneDirection = Literal["remove", "add"]

# Atoms of the law of a random contribution: for a first look at ε, and to align the grid of a lower
# bound.
ROUGH_ATOMS, _GUIDE_ATOMS = 64, 32


@dataclass(frozen=True, kw_only=True)
class Law:
    """How finely a grid is made, apart from its spacing.

    Args:
        atoms: Of the law of a random contribution.
        largest: Losses above it count as infinite there.
        tolerance: Of the search for the best lower bound.
    """

    atoms: int
    largest: float
    tolerance: float


def is_random(part: SampledGaussian) -> bool:
    """Return whether the size of a contribution is random, given that there is one."""
    return part.norms is not None or (part.records_per_unit > 1 and part.sampling_probability < 1)


def _random_step(one: SampledGaussian, bound: Bound, atoms: int, tail: float) -> OneStep:
    build = records_step if one.norms is None else sketched_step
    return build(one, bound, atoms, tail)


def step_of(part: SampledGaussian, tail: float) -> OneStep | SymmetricStep | MirroredStep:
    """Return the pair of one release."""
    q, sigma = part.sampling_probability, part.noise_multiplier
    if q == 1:
        return SymmetricStep(1.0, sigma * 2 / part.distance)
    if part.sampling == "without_replacement":
        return MirroredStep(q, sigma)
    if part.relation == "replace":
        return SymmetricStep(q, sigma)
    if part.records_per_unit > 1:
        return records_step(replace(part, steps=1), "upper", ROUGH_ATOMS, tail)
    return OneStep(part)


@lru_cache(maxsize=64)  # the number of steps does not divide the cache: `one` has one step
def grid_of(
    one: SampledGaussian,
    kind: tuple[OneDirection, Bound],
    size: tuple[float, float],
    law: Law,
) -> GridLoss:
    """Return the loss of one release, given its direction and bound, spacing and tail, and law."""
    (direction, bound), (spacing, tail) = kind, size
    if is_random(one):
        step = _random_step(one, bound, law.atoms, tail)
        largest = min(step.largest_excess(tail), law.largest - step.bottom)
        if bound == "upper":
            return dominating(step, direction, spacing, largest)
        guide = _random_step(one, bound, _GUIDE_ATOMS, tail)
        return dominated(step, direction, spacing, largest, Search(guide, law.tolerance))
    step = step_of(one, tail)
    if isinstance(step, SymmetricStep | MirroredStep):
        build = step.dominating if bound == "upper" else step.dominated
        return build(spacing, tail)
    largest = step.largest_excess(tail)
    if bound == "upper":
        return dominating(step, direction, spacing, largest)
    return dominated(step, direction, spacing, largest, Search(tolerance=law.tolerance))
