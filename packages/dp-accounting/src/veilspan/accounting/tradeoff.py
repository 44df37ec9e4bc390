"""The trade-off curve: which errors a test for one unit's presence cannot avoid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from veilspan.accounting.engines import CertifiedEngine, PldEngine
from veilspan.accounting.mechanism import Mechanism, check_probability

_SMALLEST_DELTA = 1e-12
_POINTS = 48
# Subtracted from every answer: rounding of doubles in the sums below.
_ROUNDING = 1e-13


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Lower bounds on the error rates of every test that guesses one unit's presence.

    Args:
        points: Pairs (ε, δ); the mechanism is (ε, δ)-differentially private at each of them, in
            both directions.

    Raises:
        ValueError: If a pair is not `ε ≥ 0`, `0 ≤ δ ≤ 1`.

    Guarantee:
        A test that calls an absent unit present with probability `α` at most calls a present one
        absent with probability `type_two_error(α)` at least; so it is with the roles exchanged.

    Source: Wasserman, Zhou (2010), https://arxiv.org/abs/0811.2501; Dong, Roth, Su (2019),
        https://arxiv.org/abs/1905.02383, Proposition 2.5.

    Examples:
        >>> curve = TradeOff(points=((0.0, 0.1),))
        >>> round(curve.type_two_error(0.05), 3)
        0.85
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for epsilon, delta in self.points:
            if not (epsilon >= 0 and 0 <= delta <= 1):
                raise ValueError(
                    f"points holds (ε, δ) = ({epsilon}, {delta}); needed are ε ≥ 0 and 0 ≤ δ ≤ 1."
                )

    def type_two_error(self, type_one_error: float) -> float:
        """Return the least rate of misses of any test with that rate of false alarms.

        Args:
            type_one_error: Probability of calling an absent unit present; in [0, 1].

        Raises:
            ValueError: If it is not a probability.
        """
        check_probability("type_one_error", type_one_error)
        return max(0.0, max((_least(*p, type_one_error) for p in self.points), default=0.0))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Return the largest rate of hits of any test with that rate of false alarms.

        Raises:
            ValueError: If `false_positive_rate` is not a probability.
        """
        return 1.0 - self.type_two_error(false_positive_rate)

    @property
    def largest_advantage(self) -> float:
        """Return the most by which a rate of hits can exceed its rate of false alarms."""
        balanced = (
            1.0 if math.isinf(e) else 1 - 2 * (1 - d) / (math.exp(min(e, 700.0)) + 1)
            for e, d in self.points
        )
        return min(min(balanced, default=1.0) + _ROUNDING, 1.0)

    def to_dict(self, type_one_errors: tuple[float, ...]) -> dict[str, Any]:
        """Return the curve at some rates of false alarms as plain lists."""
        return {
            "type_one_error": list(type_one_errors),
            "type_two_error": [self.type_two_error(alpha) for alpha in type_one_errors],
        }


def _least(epsilon: float, delta: float, alpha: float) -> float:
    """Return the misses that one pair (ε, δ) enforces, from each direction."""
    if math.isinf(epsilon):
        return 0.0
    root = math.exp(min(epsilon, 1400.0) / 2)  # e^ε itself may be beyond a double
    left = 1 - delta - root * alpha * root
    right = math.exp(-epsilon) * (1 - delta - alpha)
    return max(left, right) - _ROUNDING


def find_tradeoff(mechanism: Mechanism, points: int = _POINTS) -> TradeOff:
    """Return the trade-off curve of a mechanism from certified upper bounds on its ε.

    Args:
        mechanism: What is released.
        points: Number of δ at which ε is asked; more give a tighter curve.

    Raises:
        ValueError: If `points` is below 2.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a curve needs at least 2.")
    engine = CertifiedEngine(pld=PldEngine(one_sided=True))
    at_zero = engine.delta(mechanism, 0.0).upper
    pairs = [(0.0, at_zero)]
    # Where ε is small a test gains nearly δ(0): most of the curve's middle lies there.
    for delta in _levels(at_zero, points):
        pairs.append((engine.epsilon(mechanism, delta).upper, delta))
    return TradeOff(points=tuple(pairs))


def _levels(largest: float, points: int) -> list[float]:
    """Return δ from tiny ones to just below the largest that matters."""
    if largest <= _SMALLEST_DELTA:
        return []
    tiny = np.geomspace(_SMALLEST_DELTA, 0.1, points // 2)
    shares = np.linspace(0.1, 1.0, points - points // 2 + 1, endpoint=False)[1:]
    return [float(level * largest) for level in (*tiny, *shares)]
