"""One release as a pair of distributions, cut into cells along its privacy loss.

    P = (1 - q) N(0, σ²) + q N(s, σ²)   with the record        Q = N(0, σ²)   without it

The shift s is 1, or random where norms are estimated or the record is a unit of several. The loss
L(x) = log P(x)/Q(x) increases with x from log(1 - q) to infinity. Positions are given by the excess
d = L - log(1 - q) > 0, which keeps full precision where q is tiny. Of a unit of several records, q
is the chance that any of them is in the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.shifts import Shifts, UnitShift
from veilspan.accounting.mechanism import SampledGaussian

Array = NDArray[np.floating[Any]]

LARGEST_LOSS = 600.0  # exp(loss) must stay a finite double with room for products
FINE_DEVIATIONS = 12.0  # cells are one spacing wide this near to loss 0, where the mass is
# Farther out a cell may be a fraction of its distance from loss 0: the jump over the number of the
# cells one spacing wide, so that finer grids are finer everywhere, but within these limits.
_JUMP, _LEAST_GROWTH, _MOST_GROWTH = 2.4, 2e-4, 0.006


@dataclass(frozen=True)
class Cells:
    """Consecutive intervals of the loss with their probabilities.

    Args:
        start: Excess over log(1 - q) at which node number 0 lies.
        index: Node numbers, increasing from 0; node i lies at excess `start + spacing · i`.
        with_record: P of each cell between two neighbouring nodes, one fewer than `index`.
        without_record: Q of each cell.
        excess: P(cell) - e^(loss of its left node) · Q(cell), at least 0.
        deficit: e^(loss of its right node) · Q(cell) - P(cell), at least 0.
        tail: P and Q beyond the last node.
    """

    start: float
    index: NDArray[np.int64]
    with_record: Array
    without_record: Array
    excess: Array
    deficit: Array
    tail: tuple[float, float]


class OneStep:
    """The pair (P, Q) of one release, `0 < q < 1` and `0 < σ < ∞`.

    Args:
        mechanism: The release.
        shifts: The law of the shift; always 1 unless given. Of a unit of several records it is that
            of the number of records in the sample, given that there is one.
        scale: What `loss_scale` returns, if the shift is not about 1.
    """

    def __init__(
        self, mechanism: SampledGaussian, shifts: Shifts | None = None, scale: float | None = None
    ) -> None:
        several = mechanism.records_per_unit > 1
        assert not several or (shifts is not None and scale is not None)
        self.sigma = mechanism.noise_multiplier
        self.bottom = mechanism.records_per_unit * math.log1p(-mechanism.sampling_probability)
        self.q = -math.expm1(self.bottom) if several else mechanism.sampling_probability
        self.absent = math.exp(self.bottom) if several else 1 - self.q
        self._scale = scale
        self._shifts: Shifts = UnitShift(self.sigma) if shifts is None else shifts
        self._cut_last: tuple[object, Cells] | None = None

    def loss_scale(self) -> float:
        """Return the order of magnitude of the standard deviation of the loss under Q."""
        if self._scale is not None:
            return self._scale
        chi_square = math.expm1(min(self.sigma**-2, 50.0))
        return min(self.q * math.sqrt(chi_square), 1 / self.sigma)

    def largest_excess(self, tail: float) -> float:
        """Return an excess that the loss passes with probability at most `tail` under P.

        Where the shift has no bound it is no more than a double takes; what lies beyond counts as
        an infinite loss.

        Raises:
            EngineError: If the loss is too large for doubles there.
        """
        # Half the tail for each part of P; the part with the record has only a share of q.
        growth = self._shifts.growth_passed(tail / 2, min(tail / (2 * self.q), 0.5))
        excess = float(np.logaddexp(0.0, math.log(self.q) - self.bottom + growth))
        if excess <= LARGEST_LOSS:
            return excess
        if not self._shifts.bounded:
            return LARGEST_LOSS
        raise EngineError(f"the loss of one step reaches {excess:.3g}, beyond a double's range")

    def growth(self, excess: Array | float) -> Array:
        """Return the growth at which the loss exceeds log(1 - q) by `excess`; -inf at 0."""
        d = np.asarray(excess, dtype=np.float64)
        with np.errstate(divide="ignore"):
            log_growth = d + np.log(-np.expm1(-d))
        return self.bottom - math.log(self.q) + log_growth

    def cells(self, spacing: float, largest: float) -> Cells:
        """Cut the loss at log(1 - q) + `spacing` · i, the first cell beginning at its very end."""
        if self._cut_last is None or self._cut_last[0] != (spacing, largest):
            index = self._nodes(math.ceil(largest / spacing), -self.bottom, spacing)
            self._cut_last = (spacing, largest), self._cut(0.0, index, spacing, first=0.0)
        return self._cut_last[1]

    def cells_above(
        self, first_excess: float, start: float, spacing: float, largest: float
    ) -> Cells:
        """Cut the losses above `first_excess` at `start` + `spacing` · i, i from 1."""
        last = max(1, math.ceil((largest - start) / spacing))
        index = self._nodes(last, -self.bottom - start, spacing)
        return self._cut(start, index, spacing, first=first_excess)

    def below(self, excess: float) -> tuple[float, float]:
        """Return P and Q of the losses up to an excess."""
        without, shifted = self._shifts.below(float(self.growth(excess)))
        return self.absent * without + self.q * shifted, without

    def excess_of_below(self, excess: float) -> float:
        """Return the loss of the event "loss up to an excess", as an excess over log(1 - q)."""
        without, shifted = self._shifts.log_below(float(self.growth(excess)))
        return math.log1p(self.q / self.absent * math.exp(shifted - without))

    def _nodes(self, last: int, zero: float, spacing: float) -> NDArray[np.int64]:
        """Return node numbers from 0 to `last`, all of them near loss 0, which is at `zero`."""
        centre = min(max(round(zero / spacing), 0), last)
        fine = math.ceil(FINE_DEVIATIONS * self.loss_scale() / spacing)
        right = centre + distances(last - centre, fine)
        left = centre - distances(centre, fine)
        return np.unique(np.concatenate([left, right]))

    def _cut(self, start: float, index: NDArray[np.int64], spacing: float, first: float) -> Cells:
        d = start + spacing * index
        if d[-1] > LARGEST_LOSS + 100:
            raise EngineError(f"a grid of spacing {spacing:.3g} leaves the range of doubles")
        growth = self.growth(np.concatenate([[first], d[1:]]))
        masses = self._shifts.masses(growth)
        without, shifted = masses.without, masses.shifted
        # P - e^t Q with t = log(1 - q) + d, written without subtracting the (1 - q) Q that cancels.
        excess = self.q * shifted - self.absent * np.expm1(d[:-1]) * without
        deficit = self.absent * np.expm1(d[1:]) * without - self.q * shifted
        tail_without, tail_shifted = masses.tail
        return Cells(
            start=start,
            index=index,
            with_record=self.absent * without + self.q * shifted,
            without_record=without,
            excess=np.maximum(excess, 0.0),
            deficit=np.maximum(deficit, 0.0),
            tail=(self.absent * tail_without + self.q * tail_shifted, tail_without),
        )


def distances(last: int, fine: int) -> NDArray[np.int64]:
    """Return 0, 1, …, `fine` and from there ever wider steps up to `last`."""
    if last <= fine:
        return np.arange(last + 1)
    growth = min(max(_JUMP / fine, _LEAST_GROWTH), _MOST_GROWTH)
    count = int(math.log(last / fine) / growth) + 2
    far = np.geomspace(fine, last, count).astype(np.int64)
    return np.concatenate([np.arange(fine + 1), far, [last]])
