"""The second engine: Microsoft's prv-accountant, with guards and with the direction it lacks.

prv-accountant bounds ε for removing a record only, with an absolute error, and takes its domain
from Rényi orders up to 63. Here it composes both directions, its error is chosen relative to ε, its
domain comes from our own tail bounds, and what it cannot do soundly is refused.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from prv_accountant import PRVAccountant
from prv_accountant.privacy_random_variables import (
    PoissonSubsampledGaussianMechanism,
    PrivacyRandomVariable,
)
from scipy.special import ndtr

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.engines.closed_form import (
    closed_form,
    estimated_norms,
    several_records,
)
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.rdp import ORDERS, RdpEngine, log_moment
from veilspan.accounting.mechanism import Mechanism, SampledGaussian

_DELTA_ERROR = 1e-3  # share of δ that prv-accountant may spend on its own approximations
_ROUNDS = 4  # attempts at an absolute error that is small against ε


class AddDirection(PrivacyRandomVariable):
    """The loss of adding a record: log Q/P under Q, the direction prv-accountant leaves out.

    Args:
        mechanism: The release, `0 < q < 1` and `0 < σ < ∞`.
    """

    def __init__(self, mechanism: SampledGaussian) -> None:
        self._step = OneStep(mechanism)

    def cdf(self, t: Any) -> Any:
        """Return the probability that the loss is at most `t`, elementwise."""
        excess = -np.asarray(t, dtype=np.float64) - self._step.bottom
        x = self._step.sigma**2 * self._step.growth(np.maximum(excess, 0.0)) + 0.5
        return np.where(excess > 0, ndtr(-x / self._step.sigma), 1.0)


@dataclass(frozen=True, kw_only=True)
class PrvEngine:
    """Bound ε by prv-accountant in both directions; slower and wider than `PldEngine`.

    Independent code for the same number: use it to cross-check the default engine.

    Args:
        relative_error: Half the width of the answer, relative to ε, at most.
        largest_domain: Most grid points; a question that needs more is refused, not waited for.

    Raises:
        ValueError: If an argument is not positive.

    Guarantee:
        `upper` holds by Gopi, Lee, Wutschitz (2021), https://arxiv.org/abs/2106.02848, Theorem 5.5,
        in each direction, as far as rounding in the platform's long double allows.
    """

    relative_error: float = 0.01
    largest_domain: int = 1 << 20

    def __post_init__(self) -> None:
        if not (self.relative_error > 0 and self.largest_domain >= 1024):
            raise ValueError(
                f"relative_error is {self.relative_error} and largest_domain "
                f"{self.largest_domain}; they must be above 0 and at least 1024."
            )

    def epsilon(self, mechanism: Mechanism, delta: float) -> EpsilonBounds:
        """Return bounds on ε at `delta`.

        Raises:
            EngineError: If prv-accountant cannot answer soundly within the domain allowed, there
                are several phases, the relation is not add/remove, norms are estimated, or units
                hold several records.
        """
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        if not isinstance(mechanism, SampledGaussian) or mechanism.relation != "add_remove":
            raise EngineError(
                "prv-accountant is asked about one phase under add/remove only; use the default "
                "engine"
            )
        if estimated_norms(mechanism):
            raise EngineError(
                "prv-accountant is asked about exact norms only; use the default engine"
            )
        if several_records(mechanism):
            raise EngineError(
                "prv-accountant is asked about units of one record only; use the default engine"
            )
        error = self.relative_error * RdpEngine().epsilon(mechanism, delta).upper
        for _ in range(_ROUNDS):
            bounds = self._both(mechanism, delta, error)
            if bounds.upper - bounds.estimate <= 1.5 * self.relative_error * bounds.estimate:
                return bounds
            error = min(error / 2, self.relative_error * bounds.estimate or error / 10)
        raise EngineError(f"prv-accountant did not reach {self.relative_error} for {mechanism}")

    def _both(self, mechanism: SampledGaussian, delta: float, error: float) -> EpsilonBounds:
        limit = self._domain_limit(mechanism, delta, error)
        remove = PoissonSubsampledGaussianMechanism(
            sampling_probability=mechanism.sampling_probability,
            noise_multiplier=mechanism.noise_multiplier,
        )
        answers = {
            "remove": _compose(remove, mechanism.steps, delta, error, limit),
            "add": _compose(AddDirection(mechanism), mechanism.steps, delta, error, limit),
        }
        direction = "remove" if answers["remove"][2] >= answers["add"][2] else "add"
        lower, estimate, upper = (max(value, 0.0) for value in answers[direction])
        return EpsilonBounds(
            lower=lower,
            estimate=estimate,
            upper=upper,
            delta=delta,
            direction=direction,
            method="prv-accountant, both directions",
        )

    def _domain_limit(self, mechanism: SampledGaussian, delta: float, error: float) -> float:
        """Return a loss that sums of steps pass with negligible probability, on either side."""
        steps = mechanism.steps
        log_tail = math.log(8 * steps / (_DELTA_ERROR * delta))
        upper = min(
            (steps * log_moment(int(order), mechanism) + log_tail) / (int(order) - 1)
            for order in ORDERS
        )
        # On the other side P(ΣL < -l) ≤ e^-l whatever the mechanism.
        limit = max(upper, log_tail) + 3
        spacing = error / math.sqrt(steps / 2 * math.log(12 / (_DELTA_ERROR * delta)))
        points = 2 * limit / spacing
        if points > self.largest_domain:
            raise EngineError(
                f"prv-accountant would need {points:.2g} grid points for {mechanism}, more than "
                f"largest_domain={self.largest_domain}. Use the default engine, or raise "
                "relative_error or largest_domain."
            )
        if points * float(np.finfo(np.longdouble).eps) > _DELTA_ERROR * delta:
            raise EngineError(
                f"rounding of this platform's long double is not small against delta={delta:g}; "
                "use the default engine."
            )
        return limit


def _compose(
    loss: PrivacyRandomVariable, steps: int, delta: float, error: float, limit: float
) -> tuple[float, float, float]:
    """Run prv-accountant on one direction; any warning or failure inside it is a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="Assuming that true epsilon")
            accountant = PRVAccountant(
                loss,
                eps_error=error,
                delta_error=_DELTA_ERROR * delta,
                # The library takes one number as well as a list of them, and declares the list.
                max_self_compositions=steps,  # type: ignore[arg-type]
                eps_max=limit,
            )
            return accountant.compute_epsilon(delta, [steps])
    except (AssertionError, ArithmeticError, RuntimeError, ValueError, Warning) as error_inside:
        raise EngineError(f"prv-accountant gave up: {error_inside}") from error_inside
