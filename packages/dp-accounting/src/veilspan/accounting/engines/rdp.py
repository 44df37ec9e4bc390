"""ε from Rényi moments: looser by some percent to a factor of two, but hard to break."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaln, logsumexp

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.engines.closed_form import (
    SMALLEST_DELTA,
    closed_form,
    closed_form_delta,
    estimated_norms,
    live_parts,
    several_records,
)
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.mechanism import Mechanism, SampledGaussian

ORDERS = np.unique(
    np.concatenate([np.arange(2, 65), np.geomspace(65, 20_000, 60).astype(np.int64)])
)
_MARGIN = 1e-9
_METHOD = "Rényi moments"


@dataclass(frozen=True, kw_only=True)
class RdpEngine:
    """Bound ε by the best integer order of the Rényi divergence; the lower bound is 0.

    Guarantee:
        For add/remove, exact norms and units of one record only. The moment of the remove direction
        is at least that of the add direction (Mironov, Talwar, Zhang 2019,
        https://arxiv.org/abs/1908.10530, Theorem 5), so one number covers both.
        Converted by Canonne, Kamath, Steinke (2020), https://arxiv.org/abs/2004.00010, Prop. 12.
    """

    def epsilon(self, mechanism: Mechanism, delta: float) -> EpsilonBounds:
        """Return `0 ≤ ε ≤ upper` at `delta`.

        Raises:
            EngineError: If the relation is not add/remove, norms are estimated, or units hold
                several records.
        """
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        log_delta = math.log(delta)
        upper = max(0.0, min(_convert(*term, log_delta) for term in _terms(mechanism)))
        return EpsilonBounds(
            lower=0.0,
            estimate=upper,
            upper=upper,
            delta=delta,
            direction="remove",
            method=_METHOD,
        )

    def delta(self, mechanism: Mechanism, epsilon: float) -> DeltaBounds:
        """Return `0 ≤ δ ≤ upper` at `epsilon`.

        Raises:
            EngineError: If the relation is not add/remove, norms are estimated, or units hold
                several records.
        """
        exact = closed_form_delta(mechanism, epsilon)
        if exact is not None:
            return exact
        log_upper = min(_log_delta(*term, epsilon) for term in _terms(mechanism))
        upper = max(math.exp(min(log_upper, 0.0)), SMALLEST_DELTA)
        return DeltaBounds(
            lower=0.0,
            estimate=upper,
            upper=upper,
            epsilon=epsilon,
            direction="remove",
            method=_METHOD,
        )


def _terms(mechanism: Mechanism) -> list[tuple[int, float]]:
    """Return each order with the Rényi divergence of all phases together."""
    parts = live_parts(mechanism)
    if any(part.relation != "add_remove" for part in parts):
        raise EngineError("moments are known for add/remove only; use the default engine")
    if estimated_norms(mechanism):
        raise EngineError("moments are known for exact norms only; use the default engine")
    if several_records(mechanism):
        raise EngineError("moments are known for units of one record; use the default engine")
    return [
        (order, sum(part.steps * log_moment(order, part) for part in parts) / (order - 1))
        for order in map(int, ORDERS)
    ]


def _convert(order: int, moment: float, log_delta: float) -> float:
    conversion = math.log1p(-1 / order) - (log_delta + math.log(order)) / (order - 1)
    # Rounding grows with the largest term of the sums, not with their possibly small total.
    return moment + conversion + _MARGIN * (abs(moment) + abs(conversion))


def _log_delta(order: int, moment: float, epsilon: float) -> float:
    factor = moment + math.log1p(-1 / order) - epsilon
    slack = _MARGIN * (moment + epsilon + 1 / order)
    return (order - 1) * (factor + slack) - math.log(order)


def log_moment(order: int, mechanism: SampledGaussian) -> float:
    """Return log E_Q[(P/Q)^order] of one step of the remove direction, 0 < q ≤ 1.

    Source: Mironov, Talwar, Zhang (2019), https://arxiv.org/abs/1908.10530, Section 3.3.
    """
    q, sigma = mechanism.sampling_probability, mechanism.noise_multiplier
    if q == 1:
        return order * (order - 1) / (2 * sigma**2)
    k = np.arange(order + 1, dtype=np.float64)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    log_weight = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q)
    # The weights sum to one, so the excess over one carries all the precision: sum w (e^x - 1).
    exponent = k * (k - 1) / (2 * sigma**2)
    with np.errstate(divide="ignore"):
        log_excess = np.where(
            exponent > 0, exponent + np.log(-np.expm1(-np.maximum(exponent, 0))), -np.inf
        )
    log_total: Any = logsumexp(log_weight + log_excess)
    return float(np.logaddexp(0.0, log_total))
