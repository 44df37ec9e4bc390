"""The default engine: certified bounds from the distribution of the privacy loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from veilspan.accounting.bounds import Direction, EpsilonBounds
from veilspan.accounting.engines.closed_form import closed_form
from veilspan.accounting.engines.compose import Composition, WindowTooWideError
from veilspan.accounting.engines.discretise import GridLoss, dominated, dominating
from veilspan.accounting.engines.one_step import OneStep
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.mechanism import SampledGaussian

_Direction = Literal["remove", "add"]
_Bound = Literal["upper", "lower"]

_FINENESS = (0.03, 0.012, 0.005)  # grid spacing in standard deviations of one step's loss
_INFINITE = 1e-6  # share of δ that may be spent on losses beyond the grid
# Rounding of the discretised one-step loss: a bias of its mean, which every step adds again.
_LOSS_ROUNDING = 1e-15
_MARGIN = 1e-9
_ROUGH_TRANSFORM = 1 << 14
_COARSENINGS = 12


@dataclass(frozen=True, kw_only=True)
class PldEngine:
    """Bound ε from both sides by discretised privacy losses.

    Args:
        relative_width: The grid is refined until `upper / lower - 1` is at most this, or the
            largest transform is reached; either way both bounds hold.
        largest_transform: Most points of one Fourier transform.
        one_sided: Skip the lower bound, which is then 0, and the refinement: a third of the time
            for an upper bound at most 0.05 % looser. Never below the two-sided upper bound.

    Raises:
        ValueError: If an argument is not positive.

    Guarantee:
        `lower ≤ ε ≤ upper` over both directions of add/remove adjacency. Discretisation, truncation
        and aliasing are bounded by proof, rounding of doubles by margins that the tests check
        against closed forms and integrals.
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

    def epsilon(self, mechanism: SampledGaussian, delta: float) -> EpsilonBounds:
        """Return certified bounds on ε at `delta`; see the class for the guarantee."""
        exact = closed_form(mechanism, delta)
        if exact is not None:
            return exact
        bounds = self._bounds(mechanism, delta, _FINENESS[0])
        if self.one_sided:
            return bounds
        for fineness in _FINENESS[1:]:
            if bounds.upper <= bounds.lower * (1 + self.relative_width):
                break
            finer = self._bounds(mechanism, delta, fineness)
            useful = finer.upper - finer.lower < 0.7 * (bounds.upper - bounds.lower)
            bounds = _tighter(bounds, finer)
            if not useful:
                break  # the largest transform is reached
        return bounds

    def _bounds(self, mechanism: SampledGaussian, delta: float, fineness: float) -> EpsilonBounds:
        question = _Question(mechanism, delta, self.largest_transform)
        remove = question.ask("remove", "upper", fineness)
        add = question.ask("add", "upper", fineness)
        upper, direction = (remove, "remove") if remove >= add else (add, "add")
        lower = 0.0
        if not self.one_sided:
            lower = min(question.ask(direction, "lower", fineness), upper)
        return _between(lower, upper, delta, direction)


def _between(lower: float, upper: float, delta: float, direction: Direction) -> EpsilonBounds:
    return EpsilonBounds(
        lower=lower,
        estimate=lower if math.isinf(upper) else (lower + upper) / 2,
        upper=upper,
        delta=delta,
        direction=direction,
        method="privacy loss distribution",
    )


def _tighter(first: EpsilonBounds, second: EpsilonBounds) -> EpsilonBounds:
    """Return the intersection of two valid answers to one question."""
    best = first if first.upper < second.upper else second
    lower = min(max(first.lower, second.lower), best.upper)
    return _between(lower, best.upper, best.delta, best.direction)


@dataclass(frozen=True)
class _Question:
    """One mechanism and δ, to be asked for either bound in either direction."""

    mechanism: SampledGaussian
    delta: float
    largest_transform: int

    def ask(self, direction: _Direction, bound: _Bound, fineness: float) -> float:
        """Return the bound from a grid of `fineness`, or one that just fits the transform."""
        composed = self._compose(direction, bound, fineness, self._rough(direction))
        rounding = _LOSS_ROUNDING * self.mechanism.steps
        if bound == "upper":
            return composed.upper_epsilon() * (1 + _MARGIN) + rounding
        return max(composed.lower_epsilon() * (1 - _MARGIN) - rounding, 0.0)

    def _rough(self, direction: _Direction) -> float | None:
        """Return slightly less than ε, or nothing, from two transforms that cost very little."""
        rough = replace(self, largest_transform=min(_ROUGH_TRANSFORM, self.largest_transform))
        guess = None
        for _ in range(2):  # the second window is narrower, so its grid is finer
            try:
                epsilon = rough._compose(direction, "upper", _FINENESS[0], guess).upper_epsilon()
            except EngineError:
                break
            guess = 0.95 * epsilon if math.isfinite(epsilon) else guess
        return guess

    def _compose(
        self, direction: _Direction, bound: _Bound, fineness: float, guess: float | None
    ) -> Composition:
        steps = self.mechanism.steps
        # Rounding the step count up lets neighbouring questions share the one-step loss.
        tail = _INFINITE * self.delta / (1 << steps.bit_length())
        spacing = fineness * OneStep(self.mechanism).loss_scale()
        for _ in range(_COARSENINGS):
            grid = _grid(self.mechanism, (direction, bound), spacing, tail)
            try:
                return Composition(
                    grid,
                    steps,
                    self.delta,
                    largest_transform=self.largest_transform,
                    guess=guess,
                )
            except WindowTooWideError as error:
                spacing = error.spacing
        raise EngineError(f"no grid of {self.largest_transform} points holds {self.mechanism}")


def _grid(
    mechanism: SampledGaussian, kind: tuple[_Direction, _Bound], spacing: float, tail: float
) -> GridLoss:
    one = replace(mechanism, steps=1)  # the number of steps must not divide the cache
    return _cached_grid(one, kind, spacing, tail)


@lru_cache(maxsize=32)
def _cached_grid(
    mechanism: SampledGaussian, kind: tuple[_Direction, _Bound], spacing: float, tail: float
) -> GridLoss:
    step, (direction, bound) = OneStep(mechanism), kind
    build = dominating if bound == "upper" else dominated
    return build(step, direction, spacing, step.largest_excess(tail))
