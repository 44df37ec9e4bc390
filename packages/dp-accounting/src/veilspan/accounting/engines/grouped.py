"""The law of a contribution that is clipped in groups: a mean of independent heavy-tailed squares.

The squared contribution is C²/M times the sum of M independent max(1, 1/X). Its law is built by
repeated means of two laws on one grid, with every product a sum of positive numbers, so that the
smallest tail keeps its digits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.sketched import SketchedClip

Array = NDArray[np.floating[Any]]
Bound = Literal["upper", "lower"]

# Excess of the mean square over 1: evenly spaced up to an end, geometric from there.
_SPACING = 5e-4
_EVEN = 1200
_RATIO = 1.02
_LARGEST = 1e4
_ROUNDING = 1e-9  # share of a cell by which a value may miss its node
_MISSED = 1e-9  # relative: more than all such misses together, up to a million groups
_NEGLIGIBLE = 1e-60


def _nodes() -> Array:
    even = _SPACING * np.arange(_EVEN + 1)
    count = int(np.log(_LARGEST / even[-1]) / np.log(_RATIO)) + 1
    return np.concatenate([even, even[-1] * _RATIO ** np.arange(1, count + 1)])


@lru_cache(maxsize=32)
def grouped_survival(norms: SketchedClip, bound: Bound) -> tuple[Array, Array]:
    """Return sizes from 1 on, and a bound on the chance that the contribution exceeds each.

    Args:
        norms: How norms were estimated, in several groups.
        bound: From above ("upper") or below ("lower").

    Guarantee:
        Every mean of two values goes to the next node above or below, and what is beyond the last
        node stays beyond it, or is forgotten.
    """
    node = _nodes()
    survival = norms.exceeds(np.sqrt(1 + node))  # of one group
    within = -np.diff(survival)
    if bound == "upper":
        mass = np.concatenate([[1 - survival[0]], within, [survival[-1]]])
    else:
        mass = np.concatenate([within, [survival[-1]], [0.0]])
        mass[0] += 1 - survival[0]
    total: Array | None = None
    have, power, groups = 0, 1, norms.groups
    while True:
        if groups & 1:
            total = mass if total is None else _mean(total, have, mass, power, bound)
            have += power
        groups >>= 1
        if not groups:
            break
        mass, power = _mean(mass, power, mass, power, bound), 2 * power
    assert total is not None
    above = np.cumsum(total[::-1])[::-1]
    size = np.sqrt(1 + node)
    size[1:] *= 1 + (_MISSED if bound == "upper" else -_MISSED)
    return np.maximum(size, 1.0), above[1:]


def _mean(first: Array, groups: int, second: Array, more: int, bound: Bound) -> Array:
    """Return the law of the mean over `groups` and `more` groups together, on the same nodes.

    The last mass of each law is what lies beyond the last node.
    """
    node, share = _nodes(), groups / (groups + more)
    kept = [law[:-1] > _NEGLIGIBLE for law in (first, second)]
    value = np.add.outer(share * node[kept[0]], (1 - share) * node[kept[1]])
    product = np.multiply.outer(first[:-1][kept[0]], second[:-1][kept[1]])
    place = _place(value, bound).ravel()
    total = np.zeros(len(node) + 1)
    total += np.bincount(place, weights=product.ravel(), minlength=len(total))
    if bound == "upper":  # whatever is left out counts as beyond
        left, right = (
            float(law[:-1][~k].sum() + law[-1])
            for law, k in zip((first, second), kept, strict=True)
        )
        total[-1] += left + right - left * right
    return total


def _place(value: Array, bound: Bound) -> NDArray[np.int64]:
    """Return the node that each value goes to."""
    even = value / _SPACING
    far = np.log(np.maximum(even / _EVEN, 1.0)) / np.log(_RATIO)
    place = np.where(far > 0, _EVEN + far, even)
    rounded = np.ceil(place - _ROUNDING) if bound == "upper" else np.floor(place + _ROUNDING)
    return rounded.astype(np.int64)
