"""Audit of whole runs, repeated with and without a canary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veilspan.accounting.audit.checks import check_confidence
from veilspan.accounting.audit.errors import check_statistics, most_errors
from veilspan.accounting.audit.tradeoff import sampled_gaussian_curve
from veilspan.accounting.mechanism import check_delta
from veilspan.accounting.plan import PrivacyPlan

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class WholeRunsAudit:
    """What repeated runs say about the trade-off between false positives and negatives.

    Args:
        runs: Number of runs with and without the canary.
        confidence: Probability that both rates are at most what is said here.
        missed_upper: False negative rate of the attack, at most.
        alarms_upper: False positive rate of the attack, at most.
    """

    runs: tuple[int, int]
    confidence: float
    missed_upper: float
    alarms_upper: float

    def epsilon_lower(self, delta: float) -> float:
        """Return an ε that the mechanism exceeds at `delta`, with probability `confidence`.

        Raises:
            ValueError: If `delta` is outside (0, 1).

        Source: Kairouz, Oh, Viswanath (2015), https://arxiv.org/abs/1311.0776, Theorem 2.1.
        """
        check_delta(delta)
        missed, alarms = self.missed_upper, self.alarms_upper
        odds = max((1 - delta - missed) / alarms, (1 - delta - alarms) / missed)
        return math.log(odds) if odds > 1 else 0.0

    def contradicts(self, plan: PrivacyPlan) -> bool:
        """Return whether no attack on a mechanism that keeps `plan` can be as good.

        Guarantee:
            If the mechanism keeps the plan, True has probability at most 1 - `confidence`.
        """
        curve = sampled_gaussian_curve(plan.mechanism(plan.steps))
        return curve.least_missed(1 - self.missed_upper) > self.alarms_upper


def audit_whole_runs(
    with_canary: Sequence[float] | Array,
    without_canary: Sequence[float] | Array,
    *,
    confidence: float = 0.95,
) -> WholeRunsAudit:
    """Bound the error rates of an attack on whole runs, sampling included.

    Repeat a run with the canary among the records and without, with fresh coins and noise, and pass
    one statistic of each run, larger where the canary seems to be in. This sees what repetitions of
    one step cannot: a canary that takes part for certain, where Poisson sampling would leave it out
    of some runs altogether, shows at little noise.

    Args:
        with_canary: Statistics of the runs with the canary, at least 20.
        without_canary: Statistics of the runs without it, at least 20.
        confidence: Probability that the bounds hold; above 1/2 and below 1.

    Raises:
        ValueError: If statistics are too few or not finite, or `confidence` is out of range.

    Guarantee:
        Both bounds hold with probability `confidence`, whatever the mechanism.

    Examples:
        >>> import numpy as np
        >>> noise = np.random.default_rng(0).standard_normal((2, 200))
        >>> audit = audit_whole_runs(noise[0] + 8, noise[1])
        >>> round(audit.epsilon_lower(1e-5), 1)
        3.9
    """
    check_confidence(confidence)
    inside = check_statistics("with_canary", with_canary)
    outside = check_statistics("without_canary", without_canary)
    missed, alarms = most_errors(inside, outside, 1 - confidence)
    return WholeRunsAudit(
        runs=(len(inside), len(outside)),
        confidence=confidence,
        missed_upper=missed,
        alarms_upper=alarms,
    )
