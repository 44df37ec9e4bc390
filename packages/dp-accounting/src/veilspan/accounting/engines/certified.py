"""The engine that plans use: the tightest bound that is certain, a looser one in trouble."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from veilspan.accounting.bounds import EpsilonBounds
from veilspan.accounting.engines.closed_form import closed_form, gaussian_epsilon
from veilspan.accounting.engines.pld import PldEngine
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.rdp import RdpEngine
from veilspan.accounting.mechanism import SampledGaussian


@dataclass(frozen=True, kw_only=True)
class CertifiedEngine:
    """Answer by closed form or loss distribution, and by moments where those do not reach.

    Guarantee:
        Never returns less than the true ε: if the discretised loss leaves the range of doubles the
        answer is the smaller of the Rényi bound and the bound without amplification by sampling.
    """

    pld: PldEngine = field(default_factory=PldEngine)
    rdp: RdpEngine = field(default_factory=RdpEngine)

    def epsilon(self, mechanism: SampledGaussian, delta: float) -> EpsilonBounds:
        """Return bounds on ε at `delta`; `method` names the engine that answered."""
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        try:
            bounds = self.pld.epsilon(mechanism, delta)
        except (EngineError, FloatingPointError, OverflowError):
            bounds = self.rdp.epsilon(mechanism, delta)
        return _at_most(bounds, _without_sampling(mechanism, delta))


def _without_sampling(mechanism: SampledGaussian, delta: float) -> float:
    """Return ε if every record were in every sample: always an upper bound, with no guarantee lost.

    The sampled pair is a mixture of the full pair with a pair of equals, and the divergence of a
    mixture is at most the mixture of the divergences.
    """
    mu = math.sqrt(mechanism.steps) / mechanism.noise_multiplier
    return gaussian_epsilon(mu, delta) * (1 + 1e-10)


def _at_most(bounds: EpsilonBounds, upper: float) -> EpsilonBounds:
    if bounds.upper <= upper:
        return bounds
    if bounds.lower > upper:
        raise EngineError(
            f"two valid bounds contradict each other: ε ≥ {bounds.lower} ({bounds.method}) and "
            f"ε ≤ {upper} (Gaussian without sampling). This is a bug in veilspan.accounting; "
            "please report it with the plan that led here."
        )
    return replace(
        bounds,
        upper=upper,
        estimate=min(bounds.estimate, upper),
        method=f"Gaussian without sampling (tighter than {bounds.method})",
    )
