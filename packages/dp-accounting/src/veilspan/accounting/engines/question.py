"""One question to the loss distribution: either bound, in either direction, on a grid that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from veilspan.accounting.engines.closed_form import SMALLEST_DELTA, gaussian_epsilon
from veilspan.accounting.engines.compose import Composition, WindowTooWideError
from veilspan.accounting.engines.discretise import GridLoss, Search, dominated, dominating
from veilspan.accounting.engines.mirrored import MirroredStep
from veilspan.accounting.engines.one_step import LARGEST_LOSS, OneStep
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.records_step import records_step
from veilspan.accounting.engines.sketched_step import sketched_step
from veilspan.accounting.engines.symmetric import SymmetricStep
from veilspan.accounting.mechanism import SampledGaussian

OneDirection = Literal["remove", "add"]
Bound = Literal["upper", "lower"]

COARSE = 0.03  # grid spacing in standard deviations of one step's loss
_INFINITE = 1e-6  # share of δ that may be spent on losses beyond the grid
# Rounding of the discretised one-step loss: a bias of its mean, which every step adds again.
_LOSS_ROUNDING = 1e-15
_SKETCHED_ROUNDING = 1e-13  # where positions are found by iteration
_RECORDS_ROUNDING = 5e-13  # where a binomial law is computed by recursion, too
_MARGIN = 1e-9
_LOST = 1e-10
_ROUGH_TRANSFORM = 1 << 14
_COARSENINGS = 12
_GUESSES = 2
_WANTED_ERROR = 1e-4  # of δ, relative, on the coarse grid
_SKEWNESS = 0.02  # below it a sum is normal enough for a guess
# Losses of random contributions may be rare and huge: far above ε they may count as infinite.
_FIRST_LARGEST, _FAR_ABOVE = 100.0, 50.0
# Atoms of the law of a random contribution: at the first fineness, for a first look
# at ε, and to align the grid of a lower bound.
_ATOMS, _ROUGH_ATOMS, _GUIDE_ATOMS = 200, 64, 32


@dataclass(frozen=True)
class Question:
    """Phases and a δ, to be asked for either bound in either direction.

    Args:
        parts: The phases, each releasing something: at least one step, noise, and `0 < q`.
        delta: The δ at which ε is asked, or the order of magnitude of the δ that is asked.
        largest_transform: Most points of one Fourier transform.
        guesses: About where ε lies in each direction, once that is known.
        rough: Whether few atoms will do for the law of a random contribution.
    """

    parts: tuple[SampledGaussian, ...]
    delta: float
    largest_transform: int
    guesses: dict[OneDirection, float | None] = field(default_factory=dict, compare=False)
    rough: bool = False

    def epsilon(self, direction: OneDirection, bound: Bound, fineness: float) -> float:
        """Return a bound on ε from a grid of `fineness`, or one that just fits the transform."""
        if direction not in self.guesses:
            self.guesses[direction] = self._rough(direction)
        best = math.inf
        for _ in range(_GUESSES):
            guess = self.guesses[direction]
            composed = self._compose(direction, bound, fineness, guess)
            if bound == "lower":
                return max(composed.lower_epsilon() * (1 - _MARGIN) - self._rounding, 0.0)
            best = min(best, composed.upper_epsilon() * (1 + _MARGIN) + self._rounding)
            if guess is None or best >= 0.9 * guess:
                break
            self.guesses[direction] = 0.95 * best  # too large a guess makes the window too wide
        return best

    def delta_at(
        self, epsilon: float, direction: OneDirection, bound: Bound, fineness: float
    ) -> float:
        """Return a bound on δ at `epsilon`; it is sharp where it is of the order of `delta`."""
        composed = self._compose(direction, bound, fineness, epsilon)
        if bound == "upper":
            below = epsilon * (1 - _MARGIN) - self._rounding
            return min(max(composed.upper_delta(below) * (1 + _MARGIN), SMALLEST_DELTA), 1.0)
        above = epsilon * (1 + _MARGIN) + self._rounding
        return composed.lower_delta(above) * (1 - _MARGIN)

    @property
    def directions(self) -> tuple[OneDirection, ...]:
        """Return the directions to ask for; replacing is its own reverse."""
        return ("remove",) if self.parts[0].relation == "replace" else ("remove", "add")

    @property
    def _steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def _rounding(self) -> float:
        if any(part.records_per_unit > 1 for part in self.parts):
            return _RECORDS_ROUNDING * self._steps
        return (_SKETCHED_ROUNDING if self._random else _LOSS_ROUNDING) * self._steps

    @property
    def _random(self) -> bool:
        return any(_is_random(part) for part in self.parts)

    def _rough(self, direction: OneDirection) -> float | None:
        """Return slightly less than ε, or nothing, from two transforms that cost very little."""
        normal = self._nearly_normal()
        if normal is not None:
            return 0.95 * gaussian_epsilon(normal, self.delta)
        transform = min(_ROUGH_TRANSFORM, self.largest_transform)
        rough = replace(self, largest_transform=transform, rough=True)
        guess = None
        for _ in range(2):  # the second window is narrower, so its grid is finer
            try:
                epsilon = rough._compose(direction, "upper", COARSE, guess).upper_epsilon()
            except EngineError:
                break
            if math.isfinite(epsilon):
                guess = 0.95 * epsilon if guess is None else min(guess, 0.95 * epsilon)
        return guess

    def _nearly_normal(self) -> float | None:
        """Return the standard deviation of the composed loss where it is normal but for a trifle.

        The loss of one step is about q (e^g - 1), with a growth g that is normal of variance 1/σ².
        """
        square = cube = 0.0
        for part in self.parts:
            if _is_random(part) or part.relation == "replace" or part.noise_multiplier < 1:
                return None
            spread = math.expm1(part.noise_multiplier**-2)
            one = part.sampling_probability * math.sqrt(spread)
            square += part.steps * one**2
            cube += part.steps * one**3 * (spread + 3) * math.sqrt(spread)
        return math.sqrt(square) if cube < _SKEWNESS * square**1.5 else None

    def _compose(
        self, direction: OneDirection, bound: Bound, fineness: float, guess: float | None
    ) -> Composition:
        # Rounding the step count up lets neighbouring questions share the one-step loss.
        tail = _INFINITE * self.delta / (1 << self._steps.bit_length())
        spacing = fineness * self._loss_scale()
        law = _Law(
            atoms=_ROUGH_ATOMS if self.rough else math.ceil(_ATOMS * COARSE / fineness),
            largest=self._largest_loss(guess),
            tolerance=1e-3 if fineness < COARSE else 0.05,
        )
        # Far more than atoms for the law of a contribution may lose; see `norm_law`.
        lost = self.delta * _LOST if self._random else 0.0
        delta = self.delta - lost if bound == "upper" else self.delta + lost
        for _ in range(_COARSENINGS):
            grids = [
                (
                    _grid(replace(part, steps=1), (direction, bound), (spacing, tail), law),
                    part.steps,
                )
                for part in self.parts
            ]
            try:
                return Composition(
                    grids,
                    delta,
                    largest_transform=self.largest_transform,
                    guess=guess,
                    wanted_error=_WANTED_ERROR * (fineness / COARSE) ** 2,
                )
            except WindowTooWideError as error:
                spacing = error.spacing
        raise EngineError(f"no grid of {self.largest_transform} points holds {self.parts}")

    def _largest_loss(self, guess: float | None) -> float:
        """Return a loss so far above ε that larger ones may count as infinite."""
        if guess is None:
            return _FIRST_LARGEST if self.rough else LARGEST_LOSS
        return min(2 * guess + _FAR_ABOVE, LARGEST_LOSS)

    def _loss_scale(self) -> float:
        """Return the standard deviation of one step's loss, on average over the phases."""
        tail = _INFINITE * self.delta
        total = sum(part.steps * _step(part, tail).loss_scale() ** 2 for part in self.parts)
        return math.sqrt(total / self._steps)


@dataclass(frozen=True, kw_only=True)
class _Law:
    """How finely a grid is made, apart from its spacing.

    Args:
        atoms: Of the law of a random contribution.
        largest: Losses above it count as infinite there.
        tolerance: Of the search for the best lower bound.
    """

    atoms: int
    largest: float
    tolerance: float


def _is_random(part: SampledGaussian) -> bool:
    """Return whether the size of a contribution is random, given that there is one."""
    return part.norms is not None or (part.records_per_unit > 1 and part.sampling_probability < 1)


def _random_step(one: SampledGaussian, bound: Bound, atoms: int, tail: float) -> OneStep:
    build = records_step if one.norms is None else sketched_step
    return build(one, bound, atoms, tail)


def _step(part: SampledGaussian, tail: float) -> OneStep | SymmetricStep | MirroredStep:
    q, sigma = part.sampling_probability, part.noise_multiplier
    if q == 1:
        return SymmetricStep(1.0, sigma * 2 / part.distance)
    if part.sampling == "without_replacement":
        return MirroredStep(q, sigma)
    if part.relation == "replace":
        return SymmetricStep(q, sigma)
    if part.records_per_unit > 1:
        return records_step(replace(part, steps=1), "upper", _ROUGH_ATOMS, tail)
    return OneStep(part)


@lru_cache(maxsize=64)  # the number of steps does not divide the cache: `one` has one step
def _grid(
    one: SampledGaussian,
    kind: tuple[OneDirection, Bound],
    size: tuple[float, float],
    law: _Law,
) -> GridLoss:
    (direction, bound), (spacing, tail) = kind, size
    if _is_random(one):
        step = _random_step(one, bound, law.atoms, tail)
        largest = min(step.largest_excess(tail), law.largest - step.bottom)
        if bound == "upper":
            return dominating(step, direction, spacing, largest)
        guide = _random_step(one, bound, _GUIDE_ATOMS, tail)
        return dominated(step, direction, spacing, largest, Search(guide, law.tolerance))
    step = _step(one, tail)
    if isinstance(step, SymmetricStep | MirroredStep):
        build = step.dominating if bound == "upper" else step.dominated
        return build(spacing, tail)
    largest = step.largest_excess(tail)
    if bound == "upper":
        return dominating(step, direction, spacing, largest)
    return dominated(step, direction, spacing, largest, Search(tolerance=law.tolerance))
