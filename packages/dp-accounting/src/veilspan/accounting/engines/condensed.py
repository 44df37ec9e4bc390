"""Sums of many losses of which some are added up on the grid of one step, and all on a coarser one.

A transform needs the window of the sum and the spacing of one loss. Here groups of losses are added
up on their own grid first, which needs the window of a group only, and the sums are moved to a
coarser grid, where they are added up. That widens each group once, where moving every loss would
widen the result as often as there are steps. Losses that are rare and large are moved one by one.

Moving an atom to the two grid points around it such that P and Q are both kept is undone by
post-processing, and merging atoms is post-processing; so the one never lowers, the other never
raises δ(ε) of anything that the atoms are part of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.engines.discretise import merge
from veilspan.accounting.engines.one_step import Array
from veilspan.accounting.engines.tilted import Part, Tilt, TiltedSum, cut

Bound = Literal["upper", "lower"]

_NOTHING = 1e-25  # tilted mass of an atom that is far below what rounding is charged
_LARGEST_EXPONENT = 600.0
_MANY = 2000  # cells
_FEW = 20_000  # atoms whose moments take little time


class CondensedSum:
    """The sum of all losses of some parts, tilted, on a grid of its own.

    Args:
        exact: The same sum on the grid of its parts.
        groups: What is added up there, with the same tilt, and how often each of it occurs.
        large: The other parts.
        spacing: Of the new grid.
        bound: Whether no δ(ε) may become less ("upper"), or more ("lower").

    Attributes:
        size: Grid points that the transform needs.
        spacing: Of the new grid.
        moves: How many of the losses and sums were moved there.
        alone: How many of these have no neighbours.
    """

    def __init__(
        self,
        exact: TiltedSum,
        groups: Sequence[tuple[TiltedSum, int]],
        large: Sequence[Part],
        *,
        spacing: float,
        bound: Bound,
    ) -> None:
        theta = exact.tilt.theta
        grid: tuple[float, Bound] = (spacing, bound)
        moved = []
        for group, times in groups:
            tilted = group.transform()
            loss = group.first_loss + group.spacing * np.arange(len(tilted))
            moved.append(_moved(_Atoms(loss, tilted, theta, group.log_moment), grid, times))
        for part in large:
            log_moment = float(part.log_moments(np.array([theta]))[0])
            atoms = _Atoms(part.loss, part.tilted(theta), theta, log_moment)
            moved.append(_moved(atoms, grid, part.steps))
        self._exact = exact
        # Of a product of laws, each misplaced by a share of itself.
        self._charge = math.expm1(sum(times * math.log1p(group.charge) for group, times in groups))
        self.alone = sum(part.steps for part in large)
        self.moves = self.alone + sum(times for _, times in groups)
        self._sum = TiltedSum(
            moved, exact.log_weight, exact.log_delta, self._window(moved, spacing)
        )
        self.size, self.spacing = self._sum.size, spacing

    def _window(self, moved: Sequence[Part], spacing: float) -> Tilt:
        tilt = self._exact.tilt
        if sum(len(part.index) for part in moved) < _FEW:
            return cut(moved, tilt.theta, tilt.outside)
        # No loss moves by more than the spacing, so that tilted masses change by e^(θ · spacing).
        most = self.moves * spacing
        return Tilt(
            theta=tilt.theta,
            low=tilt.low - most,
            high=tilt.high + most,
            outside=tilt.outside * math.exp(2 * tilt.theta * most),
        )

    def error(self, epsilon: float) -> float:
        """Return what is charged to δ(ε) for mass that is misplaced, in units of δ."""
        # What a group misplaces is misplaced before atoms are moved.
        return self._sum.error(epsilon) + self._charge * self._exact.factor(epsilon)

    def delta(self, epsilon: float, sign: int) -> float:
        """Return δ(ε) from above (`sign` +1) or below (-1), in units of δ."""
        misplaced = self._charge * self._exact.factor(epsilon)
        return max(self._sum.delta(epsilon, sign) + sign * misplaced, 0.0)

    @property
    def last_loss(self) -> float:
        """Return the largest loss of the window."""
        return self._sum.last_loss


@dataclass(frozen=True)
class _Atoms:
    """Tilted masses at losses; each stands for `exp(log_moment - theta · loss)` times as much."""

    loss: Array
    tilted: Array
    theta: float
    log_moment: float


def _moved(atoms: _Atoms, grid: tuple[float, Bound], steps: int) -> Part:
    """Return the atoms on the multiples of a spacing, none of their bounds undone."""
    spacing, bound = grid
    kept = atoms.tilted > _NOTHING
    loss, tilted, theta = atoms.loss[kept], atoms.tilted[kept], atoms.theta
    cell = np.floor(loss / spacing).astype(np.int64)
    inside = np.clip(loss - spacing * cell, 0.0, spacing)
    move = _apart if bound == "upper" else _together
    index, mass = move(cell, inside, tilted, theta, spacing)
    occupied = mass > 0
    index, mass = index[occupied], mass[occupied]
    log_mass = np.log(mass) + atoms.log_moment - theta * spacing * index
    return Part((0.0, spacing), index, log_mass, steps)


def _apart(
    cell: NDArray[np.int64], inside: Array, tilted: Array, theta: float, spacing: float
) -> tuple[NDArray[np.int64], Array]:
    """Return grid points and tilted masses, each atom's P and Q kept."""
    upward = np.expm1(-inside) / np.expm1(-spacing)
    first = int(cell.min())
    count = int(cell.max()) - first + 2
    down = tilted * (1 - upward) * np.exp(-theta * inside)
    up = tilted * upward * np.exp(theta * (spacing - inside))
    mass = _summed(cell - first, down, count) + _summed(cell + 1 - first, up, count)
    return first + np.arange(count, dtype=np.int64), mass


def _together(
    cell: NDArray[np.int64], inside: Array, tilted: Array, theta: float, spacing: float
) -> tuple[NDArray[np.int64], Array]:
    """Return grid points and tilted masses, atoms near each other merged or their loss lowered.

    Cells are in order.
    """
    # An empty cell follows each that has no neighbour, so that only neighbours share a node.
    first = np.flatnonzero(np.diff(cell, prepend=cell[0] - 1))
    occupied = cell[first]
    alone = np.diff(occupied, append=occupied[-1] + 2) > 1
    at = np.arange(len(occupied)) + np.cumsum(alone) - alone
    cells = np.empty(len(occupied) + int(alone.sum()), dtype=np.int64)
    cells[at], cells[at[alone] + 1] = occupied, occupied[alone] + 1
    place = np.repeat(at, np.diff(first, append=len(cell)))
    # Of two neighbouring cells all that counts is their ratio; what overflows is left out.
    reference = max(int(cells[0]), int(cells[-1]) - int(_LARGEST_EXPONENT / (theta * spacing)))
    exponent = -theta * (spacing * (cell - reference) + inside)
    weight = np.where(exponent < _LARGEST_EXPONENT, tilted, 0.0)
    weight = weight * np.exp(np.minimum(exponent, _LARGEST_EXPONENT))
    at_node = merge(
        _summed(place, weight, len(cells)),
        _summed(place, weight * -np.expm1(-inside), len(cells)),
        _summed(place, weight * np.expm1(spacing - inside), len(cells)),
        last_down=True,
        # Among so many cells neighbours differ by too little to look for better shares.
        down=np.full(len(cells), 0.5) if len(cells) > _MANY else None,
    )[:-1]
    back = np.minimum(theta * spacing * (cells - reference), _LARGEST_EXPONENT)
    return cells, at_node * np.exp(back)


def _summed(place: NDArray[np.int64], weight: Array, count: int) -> Array:
    """Return the sum of the weights at each of `count` places."""
    return np.bincount(place, weights=weight, minlength=count).astype(np.float64, copy=False)
