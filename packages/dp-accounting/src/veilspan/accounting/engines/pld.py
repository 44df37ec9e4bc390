"""The default engine: certified bounds from the distribution of the privacy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from veilspan.accounting.bounds import DeltaBounds, Direction, EpsilonBounds
from veilspan.accounting.engines.closed_form import (
    closed_form,
    closed_form_delta,
    estimated_norms,
    live_parts,
    several_records,
)
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.question import COARSE, OneDirection, Question
from veilspan.accounting.engines.rdp import RdpEngine
from veilspan.accounting.mechanism import Mechanism

# Grid spacing in standard deviations of one step's loss, for who asks for ever more digits.
_FINENESS = (COARSE, 0.012, 0.005, 0.002, 8e-4, 3e-4, 1e-4)
_FINEST_ESTIMATED = 0.005  # where norms are estimated and the work grows with the square
_DELTA_WIDTH = 20  # how much wider than ε, relative, the bounds on δ may be
_USEFUL = 0.7  # a refinement must leave less of the gap than this, or there is no other
_METHOD = "privacy loss distribution"
_CONTRADICTION = 1e-6
_SMALLEST_DELTA = 1e-280


@dataclass(frozen=True, kw_only=True)
class PldEngine:
    """Bound ε from both sides by discretised privacy losses.

    Args:
        relative_width: The grid is refined until `upper / lower - 1` is at most this, or the
            largest transform is reached; either way both bounds hold. Below about 1e-5 that may
            take a larger transform.
        largest_transform: Most points of one Fourier transform.
        one_sided: Skip the lower bound, which is then 0, and the grids that would only make it
            sharper: a third of the time for an upper bound about 0.05 % looser at most. Never below
            the two-sided upper bound.

    Raises:
        ValueError: If an argument is not positive.

    Guarantee:
        `lower ≤ ε ≤ upper` over both directions of add/remove, or of replace. Discretisation,
        truncation and aliasing are bounded by proof, rounding of doubles by margins that the tests
        check against closed forms and integrals.
    """

    relative_width: float = 5e-4
    largest_transform: int = 1 << 20
    one_sided: bool = False

    def __post_init__(self) -> None:
        if not (self.relative_width > 0 and self.largest_transform >= 1024):
            raise ValueError(
                f"relative_width is {self.relative_width} and largest_transform "
                f"{self.largest_transform}; they must be above 0 and at least 1024."
            )

    def epsilon(self, mechanism: Mechanism, delta: float) -> EpsilonBounds:
        """Return certified bounds on ε at `delta`; see the class for the guarantee."""
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        question = Question(live_parts(mechanism), delta, self.largest_transform)
        bounds = self._bounds(question, _FINENESS[0], one_sided=self.one_sided)
        for fineness in _finenesses(mechanism)[1:]:
            close = self.one_sided or bounds.upper <= bounds.lower * (1 + self.relative_width)
            if close and not question.coarse:
                break
            finer = self._bounds(question, fineness, one_sided=close)
            useful = finer.upper * (1 + self.relative_width) < bounds.upper
            if not close:
                useful |= finer.upper - finer.lower < _USEFUL * (bounds.upper - bounds.lower)
            bounds = _tighter(bounds, finer)
            if not useful:
                break  # the largest transform is reached
        return bounds

    def _bounds(self, question: Question, fineness: float, *, one_sided: bool) -> EpsilonBounds:
        uppers: dict[OneDirection, float] = {}
        for d in question.directions:  # the second counts only where it is worse
            uppers[d] = question.epsilon(d, "upper", fineness, max(uppers.values(), default=0.0))
        worse = max(uppers, key=lambda d: uppers[d])
        lower, upper = 0.0, uppers[worse]
        if not one_sided:
            lower = _ordered(question.epsilon(worse, "lower", fineness), upper)
        direction: Direction = worse if len(uppers) > 1 else "both"
        return _between(lower, upper, question.delta, direction)

    def delta(self, mechanism: Mechanism, epsilon: float) -> DeltaBounds:
        """Return certified bounds on δ at `epsilon`, at most 1 % apart if the transform allows.

        Raises:
            EngineError: If the loss leaves the range of doubles.

        Guarantee:
            `lower ≤ δ(ε) ≤ upper` over both directions.
        """
        exact = closed_form_delta(mechanism, epsilon)
        if exact is not None:
            return exact
        parts = live_parts(mechanism)
        best = _delta_between(0.0, 1.0, epsilon, "both")
        moments = not (estimated_norms(mechanism) or several_records(mechanism))
        if moments and parts[0].relation == "add_remove":
            best = _tighter_delta(best, RdpEngine().delta(mechanism, epsilon))
        width = math.inf
        for fineness in _finenesses(mechanism):
            while True:  # the grid is made for a δ: ask again until it is made for about this one
                scale = max(best.upper, _SMALLEST_DELTA)
                question = Question(parts, scale, self.largest_transform)
                finer = self._delta_bounds(question, epsilon, fineness)
                best = _tighter_delta(best, finer)
                if best.upper >= 0.1 * scale or scale == _SMALLEST_DELTA:
                    break
            wide = best.upper - best.lower
            reached = best.upper <= best.lower * (1 + _DELTA_WIDTH * self.relative_width)
            if self.one_sided or reached or wide >= _USEFUL * width:
                break
            width = wide
        return best

    def _delta_bounds(self, question: Question, epsilon: float, fineness: float) -> DeltaBounds:
        uppers: dict[OneDirection, float] = {
            d: question.delta_at(epsilon, d, "upper", fineness) for d in question.directions
        }
        worse = max(uppers, key=lambda d: uppers[d])
        lower, upper = 0.0, uppers[worse]
        if not self.one_sided:
            lower = _ordered(question.delta_at(epsilon, worse, "lower", fineness), upper)
        direction: Direction = worse if len(uppers) > 1 else "both"
        return _delta_between(lower, upper, epsilon, direction)


def _finenesses(mechanism: Mechanism) -> list[float]:
    """Return the grids to try, one after the other."""
    finest = _FINEST_ESTIMATED if estimated_norms(mechanism) else 0.0
    return [fineness for fineness in _FINENESS if fineness >= finest]


def _ordered(lower: float, upper: float) -> float:
    """Return `lower`, or `upper` where only rounding puts it below.

    Raises:
        EngineError: If the two contradict each other, so that one of them must be wrong.
    """
    if lower > upper * (1 + _CONTRADICTION):
        raise EngineError(
            f"two bounds contradict each other: at least {lower} and at most {upper}. This is a "
            "bug in veilspan.accounting; please report it with the plan that led here."
        )
    return min(lower, upper)


def _between(lower: float, upper: float, delta: float, direction: Direction) -> EpsilonBounds:
    return EpsilonBounds(
        lower=lower,
        estimate=lower if math.isinf(upper) else (lower + upper) / 2,
        upper=upper,
        delta=delta,
        direction=direction,
        method=_METHOD,
    )


def _tighter(first: EpsilonBounds, second: EpsilonBounds) -> EpsilonBounds:
    """Return the intersection of two valid answers to one question."""
    best = first if first.upper < second.upper else second
    lower = min(max(first.lower, second.lower), best.upper)
    return _between(lower, best.upper, best.delta, best.direction)


def _delta_between(lower: float, upper: float, epsilon: float, direction: Direction) -> DeltaBounds:
    return DeltaBounds(
        lower=lower,
        estimate=(lower + upper) / 2,
        upper=upper,
        epsilon=epsilon,
        direction=direction,
        method=_METHOD,
    )


def _tighter_delta(first: DeltaBounds, second: DeltaBounds) -> DeltaBounds:
    """Return the intersection of two valid answers to one question."""
    best = first if first.upper < second.upper else second
    lower = min(max(first.lower, second.lower), best.upper)
    return _delta_between(lower, best.upper, best.epsilon, best.direction)
