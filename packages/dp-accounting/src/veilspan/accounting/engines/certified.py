"""The engine that plans use: the tightest bound that is certain, a looser one in trouble."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

from veilspan.accounting.bounds import DeltaBounds, EpsilonBounds
from veilspan.accounting.engines.closed_form import (
    closed_form,
    closed_form_delta,
    distance_without_sampling,
    estimated_norms,
    gaussian_delta,
    gaussian_upper,
    live_parts,
    one_release_delta,
    one_release_epsilon,
    one_sampled_release,
)
from veilspan.accounting.engines.likely_number import likely_delta, likely_epsilon
from veilspan.accounting.engines.overflow import charged_delta, charged_epsilon, cut_probability
from veilspan.accounting.engines.pld import PldEngine
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.rdp import RdpEngine
from veilspan.accounting.mechanism import Mechanism

_WITHOUT_SAMPLING = "Gaussian without sampling"
_NO_BOUND = "no bound is proved"
_TROUBLE = (EngineError, ArithmeticError)
_Bounds = TypeVar("_Bounds", EpsilonBounds, DeltaBounds)


@dataclass(frozen=True, kw_only=True)
class CertifiedEngine:
    """Answer by closed form or loss distribution, and by moments where those do not reach.

    Guarantee:
        Never returns less than the true ε: if the discretised loss leaves the range of doubles the
        answer is the smaller of the Rényi bound and the bound without amplification by sampling, or
        infinite where norms are estimated.
    """

    pld: PldEngine = field(default_factory=PldEngine)
    rdp: RdpEngine = field(default_factory=RdpEngine)

    def epsilon(self, mechanism: Mechanism, delta: float) -> EpsilonBounds:
        """Return bounds on ε at `delta`; `method` names the engine that answered."""
        cut = cut_probability(mechanism)
        if cut > 0:
            return charged_epsilon(self.epsilon, mechanism, cut, delta)
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        one = one_sampled_release(mechanism)
        if one is not None:
            return one_release_epsilon(one, delta)
        mu = distance_without_sampling(live_parts(mechanism))
        loosest = min(gaussian_upper(mu, delta), likely_epsilon(mechanism, delta))
        try:
            bounds = self.pld.epsilon(mechanism, delta)
        except _TROUBLE:
            try:
                bounds = self.rdp.epsilon(mechanism, delta)
            except EngineError:
                return EpsilonBounds(
                    lower=0.0,
                    estimate=loosest,
                    upper=loosest,
                    delta=delta,
                    direction="both",
                    method=_loosest_method(mechanism),
                )
        return _at_most(bounds, loosest, "ε")

    def delta(self, mechanism: Mechanism, epsilon: float) -> DeltaBounds:
        """Return bounds on δ at `epsilon`; `method` names the engine that answered."""
        cut = cut_probability(mechanism)
        if cut > 0:
            return charged_delta(self.delta, mechanism, cut, epsilon)
        exact = closed_form_delta(mechanism, epsilon)
        if exact is not None:
            return exact
        one = one_sampled_release(mechanism)
        if one is not None:
            return one_release_delta(one, epsilon)
        mu = distance_without_sampling(live_parts(mechanism))
        loosest = min(gaussian_delta(epsilon, mu, +1), likely_delta(mechanism, epsilon))
        try:
            bounds = self.pld.delta(mechanism, epsilon)
        except _TROUBLE:
            try:
                bounds = self.rdp.delta(mechanism, epsilon)
            except EngineError:
                return DeltaBounds(
                    lower=0.0,
                    estimate=loosest,
                    upper=loosest,
                    epsilon=epsilon,
                    direction="both",
                    method=_loosest_method(mechanism),
                )
        return _at_most(bounds, loosest, "δ")


def _loosest_method(mechanism: Mechanism) -> str:
    return _NO_BOUND if estimated_norms(mechanism) else _WITHOUT_SAMPLING


def _at_most(bounds: _Bounds, upper: float, name: str) -> _Bounds:
    """Return bounds that use what holds if every record is in every sample: never less private.

    The sampled pair is a mixture of the full pair with a pair of equals, and the divergence of a
    mixture is at most the mixture of the divergences. Of a unit of several records, no more than
    all can be in a sample, and more than a likely number hardly ever are.
    """
    if bounds.upper <= upper:
        return bounds
    if bounds.lower > upper:
        raise EngineError(
            f"two valid bounds contradict each other: {name} ≥ {bounds.lower} ({bounds.method}) "
            f"and {name} ≤ {upper} (Gaussian without sampling). This is a bug in "
            "veilspan.accounting; please report it with the plan that led here."
        )
    return replace(
        bounds,
        upper=upper,
        estimate=min(bounds.estimate, upper),
        method=f"{_WITHOUT_SAMPLING} (tighter than {bounds.method})",
    )
