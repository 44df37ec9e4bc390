"""A composition taken apart by the number of steps with a rare loss.

    Σ_k binomial(T, k) · bulk^(T-k) · rare^k

Each term can be tilted and cut as suits it, and more than a few such steps are charged to δ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veilspan.accounting.engines.tilted import Part

_CHARGED = 1e-7  # of δ, for more rare losses than there are terms
_TERMS = 24  # of a split, at most
_MOST_EXPECTED = 0.01  # rare losses in all steps, on average


@dataclass(frozen=True)
class Term:
    """The releases without rare losses, those with them, and in how many ways they can be."""

    bulk: list[Part]
    rare: list[Part]
    log_weight: float


class Split:
    """A composition taken apart by the number of rare losses.

    Args:
        parts: The losses of each kind of release.
        delta: The δ that matters.

    Attributes:
        terms: One for each number of rare losses; none if they were too many.
        beyond: Chance, at most, of more rare losses than the terms have.
    """

    def __init__(self, parts: Sequence[Part], delta: float) -> None:
        self.terms: list[Term] = []
        expected = min(math.sqrt(delta), _MOST_EXPECTED) / len(parts)
        cuts = [_rare_from(part, expected / part.steps) for part in parts]
        rare = sum(
            part.steps * float(np.exp(part.log_mass[cut:]).sum())
            for part, cut in zip(parts, cuts, strict=True)
        )
        most, self.beyond = 0, rare  # the chance of k of them is at most rare^k / k!
        while self.beyond > _CHARGED * delta:
            most += 1
            self.beyond *= rare / (most + 1)
        if math.comb(most + len(parts), most) > _TERMS:
            return
        counts = itertools.product(range(most + 1), repeat=len(parts))
        for count in counts:
            if sum(count) <= most:
                self._add(parts, cuts, count)

    def _add(self, parts: Sequence[Part], cuts: Sequence[int], count: Sequence[int]) -> None:
        """Add the term that has `count` rare losses of each kind of release."""
        term = Term([], [], math.fsum(map(_log_choices, (part.steps for part in parts), count)))
        for part, first, rare in zip(parts, cuts, count, strict=True):
            if rare > part.steps or (rare and first == len(part.index)):
                return
            if rare < part.steps:
                term.bulk.append(part.some(slice(first), part.steps - rare))
            if rare:
                term.rare.append(part.some(slice(first, None), rare))
        self.terms.append(term)


def _log_choices(steps: int, count: int) -> float:
    """Return the logarithm of a binomial coefficient, or of 0 as 0."""
    return math.fsum(math.log((steps - i) / (i + 1)) for i in range(min(count, steps)))


def groups_of(parts: Sequence[Part], times: int) -> list[tuple[list[Part], int]]:
    """Return the same releases as some that occur so many times, and the rest."""
    many = [part.some(slice(None), part.steps // times) for part in parts if part.steps >= times]
    rest = [part.some(slice(None), part.steps % times) for part in parts if part.steps % times]
    return [(share, count) for share, count in ((many, times), (rest, 1)) if share]


def _rare_from(part: Part, chance: float) -> int:
    """Return the first atom, not the lowest, from which on losses have at most this chance."""
    above = np.cumsum(np.exp(part.log_mass)[::-1])[::-1]
    return max(int(np.count_nonzero(above > chance)), 1)
