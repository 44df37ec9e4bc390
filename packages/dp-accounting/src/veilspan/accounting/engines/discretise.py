"""Losses on a grid that dominate, or are dominated by, the loss of one release.

Upper: *connect the dots* (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022,
https://arxiv.org/abs/2207.04380): each cell's mass is moved to its two end points so that P and Q
are both kept. Lower: the halves of two cells that meet at a node are merged into one event whose
loss is the node itself, which is post-processing. Both inflate or deflate the variance of a step by
a quarter of the squared cell width, and leave its mean alone up to the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from veilspan.accounting.engines.one_step import Array, OneStep


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

    The losses up to some `first` become one event, and the grid is aligned with the loss of that
    event: away from it, the event's whole mass would have to be rounded down. Any `first` is
    valid; the one that loses least lies where excess and deficit happen to meet at every node. It
    is searched for as `search` says.
    """
    search = Search() if search is None else search
    guide = step if search.guide is None else search.guide

    def loss_given_away(first: float) -> float:
        grid = _dominated_from(first * spacing, guide, direction, spacing, largest)
        return float(np.dot(grid.mass, np.exp(-grid.loss)))

    best = minimize_scalar(
        loss_given_away,
        bounds=(0.2, 1.3),
        method="bounded",
        options={"xatol": search.tolerance, "maxiter": 16},
    )
    return _dominated_from(best.x * spacing, step, direction, spacing, largest)


def _dominated_from(
    first: float,
    step: OneStep,
    direction: Literal["remove", "add"],
    spacing: float,
    largest: float,
) -> GridLoss:
    """Return a dominated loss whose first event holds the losses up to the excess `first`."""
    start = step.excess_of_below(first)
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


def merge(mass: Array, excess: Array, deficit: Array, *, last_down: bool = False) -> Array:
    """Move each cell's mass to its end nodes, never raising the loss of the result.

    Args:
        mass: Mass of each cell, cells in order of increasing loss.
        excess: How far the cell's mass exceeds what its lower node allows.
        deficit: How far it falls short of what its upper node demands.
        last_down: The last cell has nothing above it to be merged with at its upper node.

    Returns:
        The mass at each node, one more than cells.

    Guarantee:
        Whatever the shares are, a share goes up to a node only together with a share from above
        that makes the loss of the merged event at least the node's; the rest is rounded down.
    """
    down = _shares(excess, deficit, last_down=last_down)
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
