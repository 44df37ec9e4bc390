"""Losses on a grid that dominate, or are dominated by, the loss of one release.

Upper: *connect the dots* (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022,
https://arxiv.org/abs/2207.04380): each cell's mass is moved to its two end points so that P and Q
are both kept. Lower: the halves of two cells that meet at a node are merged into one event whose
loss is the node itself, which is post-processing. Both inflate or deflate the variance of a step by
a quarter of the squared cell width, and leave its mean alone up to the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from veilspan.accounting.engines.one_step import Array, OneStep

_WEIGHTLESS = 1e-11  # probability of a first event that may be rounded down
_PLACED = 1e-4  # of the spacing: how well the grid is placed
_LITTLE_LOST = 3e-4  # of the spacing: mean loss of a step that a lower bound may give away


@dataclass(frozen=True)
class GridLoss:
    """A privacy loss with values on a grid.

    Args:
        origin: Loss at index 0.
        spacing: Distance of neighbouring grid points.
        index: Grid index of each atom, increasing; the loss there is `origin + spacing · index`.
        mass: Probability of each atom under the distribution in the numerator of the loss.
        infinite: Probability of an infinite loss.
    """

    origin: float
    spacing: float
    index: NDArray[np.int64]
    mass: Array
    infinite: float

    @property
    def loss(self) -> Array:
        """Return the loss of each atom."""
        return self.origin + self.spacing * self.index


@dataclass(frozen=True)
class Search:
    """How the first event of a lower bound is searched for.

    Args:
        guide: A step much like the one in question, and cheaper; that one itself if there is none.
        tolerance: In cells.
    """

    guide: OneStep | None = None
    tolerance: float = 1e-3


def dominating(
    step: OneStep, direction: Literal["remove", "add"], spacing: float, largest: float
) -> GridLoss:
    """Return a loss that dominates the direction's: every ε computed from it is an upper bound."""
    cells = step.cells(spacing, largest)
    loss = step.bottom + spacing * cells.index
    to_lower_end = -np.expm1(-np.diff(loss))
    mass = np.zeros(len(loss))
    if direction == "remove":
        upward = np.minimum(cells.excess / to_lower_end, cells.with_record)
        mass[1:] += upward
        mass[:-1] += cells.with_record - upward
        return GridLoss(step.bottom, spacing, cells.index, mass, cells.tail[0])
    # Adding a record: the loss is -L under Q, so the right end of a cell is its smaller loss.
    upward = np.minimum(np.exp(-loss[1:]) * cells.deficit / to_lower_end, cells.without_record)
    mass[:-1] += upward
    mass[1:] += cells.without_record - upward
    mass[-1] += cells.tail[1]
    return GridLoss(-step.bottom, spacing, -cells.index[::-1], mass[::-1].copy(), 0.0)


def dominated(
    step: OneStep,
    direction: Literal["remove", "add"],
    spacing: float,
    largest: float,
    search: Search | None = None,
) -> GridLoss:
    """Return a loss that the direction's dominates: every ε computed from it is a lower bound.

    The losses up to some `first` become one event. Any `first` is valid, and any grid that begins
    at the loss of that event or, for removing, less than a spacing below it. The event may be next
    to nothing and the grid placed such that excess and deficit meet at every node; or the grid
    begins at the loss of the event, so that its mass need not be rounded down, and `first` is
    placed. Where the first way does not succeed, the better one is taken.
    """
    search = Search() if search is None else search
    guide = step if search.guide is None else search.guide
    grid = None
    if direction == "remove" and search.guide is None:
        grid = _placed_grid(step, spacing, largest)
        if grid is not None and _total_without(grid) - 1 < _LITTLE_LOST * spacing:
            return grid

    def loss_given_away(first: float) -> float:
        return _total_without(_dominated_from(first * spacing, guide, direction, spacing, largest))

    best: Any = minimize_scalar(
        loss_given_away,
        bounds=(0.2, 1.3),
        method="bounded",
        options={"xatol": search.tolerance, "maxiter": 16},
    )
    other = _dominated_from(best.x * spacing, step, direction, spacing, largest)
    return grid if grid is not None and _total_without(grid) < _total_without(other) else other


def _placed_grid(step: OneStep, spacing: float, largest: float) -> GridLoss | None:
    """Return a dominated loss with a first event of no weight, if the grid is coarse against it."""
    first = _first_of_no_weight(step, spacing, largest)
    loss = step.excess_of_below(first)
    room = 1 - 1.01 * (first - loss) / spacing
    if room <= 0:  # the first cell would end before it begins
        return None

    def mismatch(down: float) -> float:
        """Return what is left over at the largest cell, as if nodes were counted from the first."""
        cells = step.cells_above(first, loss - down * spacing, spacing, largest)
        share = _shares(cells.excess, cells.deficit, last_down=False)
        peak = int(np.argmax(cells.excess + cells.deficit))
        if peak == 0:
            return math.nan
        left = (1 - share[peak - 1]) * cells.deficit[peak - 1] - share[peak] * cells.excess[peak]
        return float(left) * (-1) ** peak

    ends = mismatch(0.0), mismatch(room)
    down = 0.0
    if ends[0] * ends[1] < 0:
        placed: Any = brentq(mismatch, 0.0, room, xtol=_PLACED, maxiter=20, disp=False)
        down = float(placed)
    return _dominated_from(first, step, "remove", spacing, largest, down=down * spacing)


def _first_of_no_weight(step: OneStep, spacing: float, largest: float) -> float:
    """Return about the excess up to which the probability of the loss is negligible."""

    def weight(log_excess: float) -> float:
        return math.log(max(step.below(math.exp(log_excess))[1], 1e-300) / _WEIGHTLESS)

    low, high = math.log(spacing) - 30, math.log(largest)
    root: Any = low if weight(low) >= 0 else brentq(weight, low, high, xtol=1e-2)
    return math.exp(root)


def _total_without(grid: GridLoss) -> float:
    """Return the probability without the record that a loss stands for; 1 if none is given away."""
    return float(np.dot(grid.mass, np.exp(-grid.loss)))


def _dominated_from(
    first: float,
    step: OneStep,
    direction: Literal["remove", "add"],
    spacing: float,
    largest: float,
    down: float = 0.0,
) -> GridLoss:
    """Return a dominated loss whose first event holds the losses up to the excess `first`.

    The grid begins `down` below the loss of that event.
    """
    start = step.excess_of_below(first) - down
    cells = step.cells_above(first, start, spacing, largest)
    first_with, first_without = step.below(first)
    if direction == "remove":
        mass = merge(cells.with_record, cells.excess, cells.deficit)
        mass[0] += first_with
        mass[-1] += cells.tail[0]
        return GridLoss(step.bottom + start, spacing, cells.index, mass, 0.0)
    loss = step.bottom + start + spacing * cells.index
    mass = merge(
        cells.without_record[::-1],
        (np.exp(-loss[1:]) * cells.deficit)[::-1],
        (np.exp(-loss[:-1]) * cells.excess)[::-1],
        last_down=True,
    )
    mass[-1] += first_without
    return GridLoss(-step.bottom - start, spacing, -cells.index[::-1], mass, 0.0)


def merge(
    mass: Array,
    excess: Array,
    deficit: Array,
    *,
    last_down: bool = False,
    down: Array | None = None,
) -> Array:
    """Move each cell's mass to its end nodes, never raising the loss of the result.

    Args:
        mass: Mass of each cell, cells in order of increasing loss.
        excess: How far the cell's mass exceeds what its lower node allows.
        deficit: How far it falls short of what its upper node demands.
        last_down: The last cell has nothing above it to be merged with at its upper node.
        down: Share of each cell that goes down; the best one if not given.

    Returns:
        The mass at each node, one more than cells.

    Guarantee:
        Whatever the shares are, a share goes up to a node only together with a share from above
        that makes the loss of the merged event at least the node's; the rest is rounded down.
    """
    down = _shares(excess, deficit, last_down=last_down) if down is None else down
    up_mass, up_deficit = (1 - down) * mass, (1 - down) * deficit
    available = np.append((down * excess)[1:], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        merged = np.where(up_deficit > available, available / up_deficit, 1.0)
    at_node = np.zeros(len(mass) + 1)
    at_node[1:] += merged * up_mass
    at_node[:-1] += (1 - merged) * up_mass + down * mass
    return at_node


def _shares(excess: Array, deficit: Array, *, last_down: bool) -> Array:
    """Return the share of each cell that goes down, so that excess meets deficit at every node.

    Node i balances where `(1 - down[i-1]) deficit[i-1] = down[i] excess[i]`. Solving from either
    end towards the largest cell damps the error of the first guess.
    """
    count = len(excess)
    peak = int(np.argmax(excess + deficit))
    up, down = deficit.tolist(), excess.tolist()
    share = [0.5] * count
    if last_down:
        share[-1] = 1.0
    else:
        share[0] = 0.0
    for i in range(count - 2, peak - 1, -1):
        if up[i] > 0 and (i > 0 or last_down):
            share[i] = min(max(1 - share[i + 1] * down[i + 1] / up[i], 0.0), 1.0)
    for i in range(1, peak):
        if down[i] > 0:
            share[i] = min(max((1 - share[i - 1]) * up[i - 1] / down[i], 0.0), 1.0)
    return np.asarray(share)
