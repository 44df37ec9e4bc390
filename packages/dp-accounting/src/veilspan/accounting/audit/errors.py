"""False positives and negatives of a threshold, bounded from above."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

Array = NDArray[np.float64]

_FEWEST = 20
_PLACING = 10  # one statistic in so many places the threshold and is then not counted


def check_statistics(name: str, values: Sequence[float] | Array) -> Array:
    """Return statistics as doubles.

    Raises:
        ValueError: If they are no row of at least 20 finite numbers.
    """
    statistics = np.asarray(values)
    if statistics.ndim != 1 or statistics.dtype.kind not in "iuf" or len(statistics) < _FEWEST:
        raise ValueError(
            f"{name} has shape {statistics.shape} and dtype {statistics.dtype}; it must be one row "
            f"of at least {_FEWEST} numbers, one per repetition."
        )
    if not np.isfinite(statistics).all():
        raise ValueError(
            f"{name} holds {np.count_nonzero(~np.isfinite(statistics))} numbers that are not "
            "finite. What releases such numbers is broken; it cannot be audited."
        )
    return statistics.astype(np.float64)


def most_errors(inside: Array, outside: Array, level: float) -> tuple[float, float]:
    """Return upper bounds on the false negative and the false positive rate of a threshold.

    The threshold is the middle between the means of the first tenths; those are not counted.

    Guarantee:
        Both hold together with probability 1 - `level` (Clopper-Pearson), for statistics that are
        independent repetitions of any law.
    """
    first_in, first_out = len(inside) // _PLACING, len(outside) // _PLACING
    threshold = (inside[:first_in].mean() + outside[:first_out].mean()) / 2
    inside, outside = inside[first_in:], outside[first_out:]
    missed = _largest_chance(int((inside <= threshold).sum()), len(inside), level / 2)
    alarms = _largest_chance(int((outside > threshold).sum()), len(outside), level / 2)
    return missed, alarms


def _largest_chance(events: int, trials: int, level: float) -> float:
    """Return the largest probability at which so few events have a chance of `level`."""
    return 1.0 if events == trials else float(betaincinv(events + 1, trials - events, 1 - level))
