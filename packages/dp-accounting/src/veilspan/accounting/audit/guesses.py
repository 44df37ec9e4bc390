"""How likely right guesses about canaries are, under a claim of privacy.

`canaries` many were put in or left out by fair coins; of `guesses` guesses about them, `right` were
right. Counts are whole numbers with right ≤ guesses ≤ canaries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, expit

from veilspan.accounting.audit.tradeoff import TradeOff

_ROUNDING = 1e-9


def count_right(scores: NDArray[np.float64], members: NDArray[np.bool_], *, guesses: int) -> int:
    """Guess "in" for the highest scores, "out" for as many of the lowest, and count right guesses.

    Of an odd number the larger part goes to "in". Equal scores count against the auditor: where
    they must be told apart, the wrong guess is made.
    """
    order = np.lexsort((~members, scores))  # by score; of equal ones those that are in come first
    lowest = guesses // 2
    highest = guesses - lowest
    right_in = int(members[order[len(order) - highest :]].sum())
    right_out = int((~members[order[:lowest]]).sum())
    return right_in + right_out


def chance_of_right(
    canaries: int, guesses: int, right: int, *, epsilon: float, delta: float
) -> float:
    """Return a bound on the chance of at least `right` right guesses under (ε, δ).

    Guarantee:
        Whoever guesses, from the output of an (ε, δ)-differentially private mechanism and nothing
        else about the coins, has at most this chance.

    Source: Steinke, Nasr, Jagielski (2023), https://arxiv.org/abs/2305.08846, the theorem for
    (ε, δ) with abstentions.
    """
    if right <= 0:
        return 1.0
    chance = expit(epsilon)
    at_least = float(bdtrc(right - 1, guesses, chance))
    fewer = np.arange(1, right + 1)
    excess = float(np.max((bdtrc(right - 1 - fewer, guesses, chance) - at_least) / fewer))
    return min(1.0, at_least + 2 * canaries * delta * max(excess, 0.0))


def contradicts(curve: TradeOff, canaries: int, guesses: int, right: int, *, level: float) -> bool:
    """Return whether so many right guesses have a chance below `level` under a trade-off curve.

    Guarantee:
        If the mechanism keeps the curve, the answer is True with probability at most `level`.

    Source: Mahloujifar, Melis, Chaudhuri (2024), https://arxiv.org/abs/2410.22235, the
    recursion for guesses of bits with abstentions.
    """
    if right <= 0:
        return False
    # Shares of right and wrong guesses in the event of at least i right ones, from `right` down.
    right_share = level * right / canaries
    wrong_share = level * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        wrong = max(wrong_share, curve.least_missed(right_share * (1 - _ROUNDING)))
        right_share = min(1.0, right_share + i / (guesses - i) * (wrong - wrong_share))
        wrong_share = wrong
    return right_share + wrong_share > guesses / canaries * (1 + _ROUNDING)
