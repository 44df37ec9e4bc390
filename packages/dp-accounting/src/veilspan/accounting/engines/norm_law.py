"""The law of a contribution whose norm was estimated, as few atoms that bound it from either side.

Moving mass to a larger size gives a pair that dominates, moving it to a smaller one a pair that is
dominated. That alone costs the width of a cell. In a cell [a, b] of width Δ much less is enough:

- upper: mass is split between the two ends so that its mean is kept, and the ends move up by τ;
- lower: mass is put at its mean, which moves down by τ.

The divergences come from means of g(s) = Φ((s - c)/σ) over the sizes: with one c for all of them if
the size is hidden, and the best c for each if it is revealed. So it is enough to bound g cell by
cell, for every c. With z = (s - c)/σ, -g'' is z/σ times g', and g' changes by a factor of at most
e^(Zw) over a width of wσ = Δ + τ, if z ≤ Z in it. Splitting loses at most Δ²/8 · sup(-g''), as does
averaging, and the move gains at least τ · inf g': τ = Δ² Z/(8σ) · e^(2ZΔ/σ), if at most Δ, will do.

If z > Z somewhere in the cell, g is above 1 - κ in all of it, κ = Φ(w - Z), so that at most κ is
lost. As cells end below Zσ, c is negative then: Q(x > c) ≥ 1/2, and the ratio P/Q there is at least
1 - q. Taking a share of 2qκ/(1 - q) from Q makes up for it. Z is so large that this is far less
than what is given away for rounding. Larger sizes are rounded without a split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from veilspan.accounting.engines.grouped import Array, Bound, grouped_survival
from veilspan.accounting.sketched import SketchedClip

_POINTS = 1 << 15  # of the survival function
# Cells are narrow where powers of the density are large: the tail decides small δ. The second power
# leaves at least this share of width to where the density is about the tail, however small that is.
_POWER, _TAIL_POWER, _TAIL_SHARE = 0.25, 0.1, 0.05
_NEGLIGIBLE, _SMALLEST = 1e-12, 1e-305  # of the tail: mass that may as well count as beyond
_WIDEST = 0.2  # w of a cell that is treated in this way, at most
_LOST = 1e-9  # κ against the tail


@dataclass(frozen=True, eq=False)
class Atoms:
    """A discrete law of contributions in units of the threshold.

    Args:
        size: Sizes, increasing.
        weight: Probability of each.
        beyond: Probability of a size beyond all of them, to be taken for infinite.
    """

    size: Array
    weight: Array
    beyond: float


@dataclass(frozen=True, eq=False, kw_only=True)
class FineLaw:
    """A law of contributions in many cells.

    Args:
        size: Sizes, increasing; cell i is between sizes i and i + 1.
        mass: Probability of each cell, one fewer than sizes.
        place: Where in its cell the mass lies.
        at_first: Probability of the first size.
        beyond: Probability of a larger size than the last.
    """

    size: Array
    mass: Array
    place: Array
    at_first: float
    beyond: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What atoms have to be fine against.

    Args:
        sigma: The noise's standard deviation σ.
        largest: No atom need be larger: what is, may count as infinite.
        tail: Nor need one be that is exceeded with less than this probability.
    """

    sigma: float
    largest: float
    tail: float


def find_atoms(norms: SketchedClip, bound: Bound, *, count: int, scale: Scale) -> Atoms:
    """Return about `count` atoms whose pair bounds that of the contribution.

    Args:
        norms: How norms were estimated.
        bound: From above ("upper") or below ("lower").
        count: Number of atoms, about.
        scale: What they have to be fine against.

    Guarantee:
        As in the module, after the mass between two neighbours of 32,768 sizes was moved to one.
    """
    size, survival = _survival(norms, bound, scale)
    law = FineLaw(
        size=size,
        mass=-np.diff(survival),
        place=size[1:] if bound == "upper" else size[:-1],
        at_first=1 - float(survival[0]),
        beyond=float(survival[-1]),
    )
    return gather(law, bound, count=count, scale=scale)


def gather(law: FineLaw, bound: Bound, *, count: int, scale: Scale) -> Atoms:
    """Return about `count` atoms whose pair bounds that of a law with many.

    Args:
        law: The law.
        bound: From above ("upper") or below ("lower").
        count: Number of atoms, about.
        scale: What they have to be fine against.

    Guarantee:
        As in the module.
    """
    size, mass = law.size, law.mass
    ends = _choose(law, count, scale.tail)
    total, moment = (np.add.reduceat(values, ends[:-1]) for values in (mass, mass * law.place))
    low, high = size[ends[:-1]], size[ends[1:]]
    up = np.clip((moment - low * total) / (high - low), 0.0, total)  # mass · (mean - a)/Δ
    move, small = _move(low, high, scale)
    first, at_first, beyond = float(size[0]), law.at_first, law.beyond
    if bound == "lower":
        middle = np.where(small, low + (high - low) * up / np.maximum(total, 1e-300) - move, low)
        middle = np.append(middle, [first, high[-1]])
        return collect(middle, [total, at_first, beyond], beyond=0.0, tail=scale.tail)
    up = np.where(small, up, total)
    node = np.append(low, high[-1])
    node = node + np.maximum(np.append(move, 0.0), np.append(0.0, move))
    weight = np.append(total - up, 0.0) + np.append(0.0, up)
    node = np.append(node, first)
    return collect(node, [weight, at_first], beyond=beyond, tail=scale.tail)


def collect(size: Array, weights: list[Array | float], *, beyond: float, tail: float) -> Atoms:
    """Return atoms in order of size; those of negligible weight count as beyond all others."""
    weight = np.concatenate([np.atleast_1d(values) for values in weights])
    order = np.argsort(size, kind="stable")
    size, weight = size[order], weight[order]
    kept = weight > max(_NEGLIGIBLE * tail, _SMALLEST)
    return Atoms(size=size[kept], weight=weight[kept], beyond=beyond + float(weight[~kept].sum()))


def _move(low: Array, high: Array, scale: Scale) -> tuple[Array, NDArray[np.bool_]]:
    """Return τ of each cell, and whether it is small enough to be worth it; 0 where it is not."""
    most = -float(ndtri(_LOST * scale.tail)) + 2 * _WIDEST  # Z
    width = high - low
    with np.errstate(over="ignore"):
        move = most / 8 / scale.sigma * np.square(width) * np.exp(2 * most * width / scale.sigma)
    small = (move < width / 2) & (width < _WIDEST * scale.sigma / 2)
    small &= high + width < most * scale.sigma
    return np.where(small, move, 0.0), small


def _survival(norms: SketchedClip, bound: Bound, scale: Scale) -> tuple[Array, Array]:
    """Return sizes from 1 on, and a bound on the chance that the contribution exceeds each."""
    if norms.groups > 1:
        size, survival = grouped_survival(norms, bound)
        wanted = (survival > scale.tail) & (size < scale.largest)
        last = max(int(np.count_nonzero(wanted)), 1)
        return size[: last + 1], survival[: last + 1]
    size = 1 + np.geomspace(1e-3, max(scale.largest - 1, 1e-2), 400)
    enough = np.flatnonzero(norms.exceeds(size) <= scale.tail)
    last_size = float(size[enough[0]] if len(enough) else size[-1])
    size = 1 + (last_size - 1) * np.linspace(0, 1, _POINTS) ** 2
    return size, norms.exceeds(size)


def _choose(law: FineLaw, count: int, tail: float) -> NDArray[np.int64]:
    """Return indices of the sizes that become ends of cells, the first and the last among them."""
    size, width = law.size, np.diff(law.size)
    density = np.maximum(law.mass, _SMALLEST) / width
    share = np.zeros(len(width))
    log_share = math.log(_TAIL_SHARE)
    log_tail = min(math.log(max(tail, _SMALLEST)), log_share / _TAIL_POWER)
    for power in (_POWER, log_share / log_tail):
        part = density**power * width
        share += part / part.sum()
    share = np.concatenate([[0.0], np.cumsum(share)])
    chosen = np.searchsorted(share, np.linspace(0, share[-1], count + 1))
    return np.unique(np.minimum(chosen, len(size) - 1))
