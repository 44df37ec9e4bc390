"""One question to the loss distribution: either bound, in either direction, on a grid that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from veilspan.accounting.engines.closed_form import SMALLEST_DELTA, gaussian_epsilon
from veilspan.accounting.engines.compose import Composition, WindowTooWideError
from veilspan.accounting.engines.condensed import Bound
from veilspan.accounting.engines.grids import (
    ROUGH_ATOMS,
    Law,
    OneDirection,
    grid_of,
    is_random,
    step_of,
)
from veilspan.accounting.engines.one_step import LARGEST_LOSS
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.mechanism import SampledGaussian

COARSE = 0.03  # grid spacing in standard deviations of one step's loss
_INFINITE = 1e-6  # share of δ that may be spent on losses beyond the grid
# Rounding of the discretised one-step loss: a bias of its mean, which every step adds again.
_LOSS_ROUNDING = 1e-15
_SKETCHED_ROUNDING = 1e-13  # where positions are found by iteration
_RECORDS_ROUNDING = 5e-13  # where a binomial law is computed by recursion, too
_MARGIN = 1e-9
_LOST = 1e-10
# Points of a first transform, and how many times as many are tried next, as long as that makes a
# bound sharper.
_FIRST_ROOM, _MORE_ROOM = 1 << 17, 4
_COARSENINGS = 12
_NO_EPSILON = 1e-100  # as good as none
# On the coarse grid: of δ, that may be charged; of ε, that a grid may widen it by.
_WANTED_ERROR, _WIDENED = 1e-4, 1.5e-4
_LOOSE = 5e-4  # of ε: what a grid may widen it by and be left alone
_SKEWNESS = 0.02  # below it a sum is normal enough for a guess
# Losses of random contributions may be rare and huge: far above ε they may count as infinite.
_FIRST_LARGEST, _FAR_ABOVE = 100.0, 50.0
_ATOMS = 200  # of the law of a random contribution, on the coarse grid


@dataclass
class _Known:
    """What has been found out of one direction.

    Args:
        guess: About where ε lies, rather too small than too large.
        room: Points of the last transform.
        upper: The least upper bound.
        coarse: Whether it may be loose for its grid, where a transform has room for a finer one.
    """

    guess: float | None = None
    room: int = 0
    upper: float = math.inf
    coarse: bool = False


@dataclass(frozen=True)
class Question:
    """Phases and a δ, to be asked for either bound in either direction.

    Args:
        parts: The phases, each releasing something: at least one step, noise, and `0 < q`.
        delta: The δ at which ε is asked, or the order of magnitude of the δ that is asked.
        largest_transform: Most points of one Fourier transform.
        known: What has been found out so far, in each direction.
    """

    parts: tuple[SampledGaussian, ...]
    delta: float
    largest_transform: int
    known: dict[OneDirection, _Known] = field(default_factory=dict, compare=False)

    def epsilon(
        self, direction: OneDirection, bound: Bound, fineness: float, enough: float = 0.0
    ) -> float:
        """Return a bound on ε from a grid of `fineness`, or from one that leaves little to gain.

        An upper bound need not be sharp once it is at most `enough`.
        """
        known = self.known.setdefault(direction, _Known(self._nearly_normal()))
        if bound == "lower":
            return self._lower(direction, fineness, known)
        known.upper = self._upper(direction, fineness, enough, known)
        return known.upper

    def _upper(
        self, direction: OneDirection, fineness: float, enough: float, known: _Known
    ) -> float:
        """Return an upper bound on ε from transforms of ever more room, until one is sharp."""
        best = min(self._most(direction), known.upper)
        rooms = self._rooms(known)
        known.coarse = False
        for number, room in enumerate(rooms, 1):
            if best <= enough:
                break
            last = number == len(rooms)
            rough = self._random and not last
            spacing = self._spacing(fineness, known.guess)
            try:
                composed = self._compose(direction, ("upper", fineness), known.guess, room, rough)
                found = composed.epsilon() * (1 + _MARGIN) + self._rounding
            except EngineError:
                if last:
                    raise
                continue
            best, known.room = min(best, found), room
            if math.isfinite(best):
                known.guess = 0.95 * best
            known.coarse = False
            if rough:
                continue
            if _settled(composed, found, fineness):
                break
            loose = _NO_EPSILON < found < math.inf and composed.widened(found) > _LOOSE
            known.coarse = loose and composed.step_spacing <= spacing
        return best

    @property
    def coarse(self) -> bool:
        """Return whether an upper bound may be loose for want of a finer grid, which has room."""
        return any(known.coarse for known in self.known.values())

    def _lower(self, direction: OneDirection, fineness: float, known: _Known) -> float:
        """Return a lower bound on ε from transforms of ever more room, until one is sharp."""
        best = 0.0
        for room in self._rooms(known):
            composed = self._compose(direction, ("lower", fineness), known.guess, room)
            found = composed.epsilon() * (1 - _MARGIN) - self._rounding
            best = max(best, found)
            if _settled(composed, found, fineness):
                break
        return best

    def _rooms(self, known: _Known) -> list[int]:
        """Return grid points of transforms to try, one after the other."""
        rooms = [min(known.room or _FIRST_ROOM, self.largest_transform)]
        while rooms[-1] < self.largest_transform:
            rooms.append(min(_MORE_ROOM * rooms[-1], self.largest_transform))
        return [*rooms[:1], *rooms[-1:]] if self._random and len(rooms) > 1 else rooms

    def _most(self, direction: OneDirection) -> float:
        """Return what ε is at most, whatever δ: the loss of adding a record has an end."""
        if direction == "remove" or any(part.sampling_probability == 1 for part in self.parts):
            return math.inf
        absent = sum(
            part.steps * part.records_per_unit * math.log1p(-part.sampling_probability)
            for part in self.parts
        )
        return -absent * (1 + _MARGIN)

    def delta_at(
        self, epsilon: float, direction: OneDirection, bound: Bound, fineness: float
    ) -> float:
        """Return a bound on δ at `epsilon`; it is sharp where it is of the order of `delta`."""
        room = self.largest_transform
        composed = self._compose(direction, (bound, fineness), epsilon, room)
        if bound == "upper":
            below = epsilon * (1 - _MARGIN) - self._rounding
            return min(max(composed.delta(below) * (1 + _MARGIN), SMALLEST_DELTA), 1.0)
        above = epsilon * (1 + _MARGIN) + self._rounding
        return composed.delta(above) * (1 - _MARGIN)

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
        return any(is_random(part) for part in self.parts)

    def _nearly_normal(self) -> float | None:
        """Return slightly less than ε where the composed loss is normal but for a trifle.

        The loss of one step is about q (e^g - 1), with a growth g that is normal of variance 1/σ².
        """
        square = cube = 0.0
        for part in self.parts:
            if is_random(part) or part.relation == "replace" or part.noise_multiplier < 1:
                return None
            spread = math.expm1(part.noise_multiplier**-2)
            one = part.sampling_probability * math.sqrt(spread)
            square += part.steps * one**2
            cube += part.steps * one**3 * (spread + 3) * math.sqrt(spread)
        if cube >= _SKEWNESS * square**1.5:
            return None
        return 0.95 * gaussian_epsilon(math.sqrt(square), self.delta)

    def _compose(
        self,
        direction: OneDirection,
        kind: tuple[Bound, float],
        guess: float | None,
        room: int,
        rough: bool = False,
    ) -> Composition:
        """Return the composed loss on a grid of the fineness, or one that just fits the room.

        Args:
            direction: Which.
            kind: Bound and fineness.
            guess: About where ε lies.
            room: Most points of a transform.
            rough: Whether few atoms will do for the law of a random contribution.
        """
        bound, fineness = kind
        # Rounding the step count up lets neighbouring questions share the one-step loss.
        tail = _INFINITE * self.delta / (1 << self._steps.bit_length())
        spacing = self._spacing(fineness, guess)
        law = Law(
            atoms=ROUGH_ATOMS if rough else math.ceil(_ATOMS * COARSE / fineness),
            largest=_largest_loss(guess, rough),
            tolerance=1e-3 if fineness < COARSE else 0.05,
        )
        # Far more than atoms for the law of a contribution may lose; see `norm_law`.
        lost = self.delta * _LOST if self._random else 0.0
        delta = self.delta - lost if bound == "upper" else self.delta + lost
        for _ in range(_COARSENINGS):
            grids = [
                (
                    grid_of(replace(part, steps=1), (direction, bound), (spacing, tail), law),
                    part.steps,
                )
                for part in self.parts
            ]
            try:
                return Composition(
                    grids,
                    delta,
                    bound,
                    largest_transform=room,
                    guess=guess,
                    wanted_error=_relative(fineness) * _WANTED_ERROR,
                )
            except WindowTooWideError as error:
                spacing = error.spacing
        raise EngineError(f"no grid of {room} points holds {self.parts}")

    def _spacing(self, fineness: float, guess: float | None) -> float:
        """Return that of a grid that widens ε by little: about λ T h²/8 for a slope λ of log δ."""
        tail = _INFINITE * self.delta
        total = sum(part.steps * step_of(part, tail).loss_scale() ** 2 for part in self.parts)
        spacing = fineness * math.sqrt(total / self._steps)
        if guess is None or guess < _NO_EPSILON:
            return spacing
        # Of a normal sum of variance S² the mean is S²/2, and -2 log δ its slope times the rest.
        beyond_mean = max(guess - total / 2, 0.02 * guess)
        slope = -2 * math.log(min(self.delta, 0.1)) / beyond_mean
        widened = _relative(fineness) * _WIDENED * guess
        return max(spacing, math.sqrt(8 * widened / (slope * self._steps)))


def _settled(composed: Composition, epsilon: float, fineness: float) -> bool:
    """Return whether a finer grid than that of `composed` would hardly change ε."""
    if not _NO_EPSILON < epsilon < math.inf:
        return epsilon <= _NO_EPSILON
    relative = _relative(fineness)
    sharp = composed.error(epsilon) <= 10 * relative * _WANTED_ERROR
    return sharp and composed.widened(epsilon) <= relative * _WIDENED


def _relative(fineness: float) -> float:
    """Return what share of the errors on the coarse grid a finer one may have."""
    return (fineness / COARSE) ** 2


def _largest_loss(guess: float | None, rough: bool) -> float:
    """Return a loss so far above ε that larger ones may count as infinite."""
    if guess is None:
        return _FIRST_LARGEST if rough else LARGEST_LOSS
    return min(2 * guess + _FAR_ABOVE, LARGEST_LOSS)
