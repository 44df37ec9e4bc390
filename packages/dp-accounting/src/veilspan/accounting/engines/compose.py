"""Many independent losses added up: δ(ε) of their sum, and the ε where it meets a δ.

Losses that are rare and large against the rest would need a wide window, and no tilt suits both
them and the bulk. Where that hurts, the losses of a step are split at a size that few of all steps
pass, and the composition is taken apart by the number k of steps that pass it:

    Σ_k binomial(T, k) · bulk^(T-k) · rare^k

Each term has a tilt and a window of its own, and more than a few such steps are charged to δ. What
is still too wide for the spacing of one step is added up in groups (`condensed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import brentq

from veilspan.accounting.engines.condensed import Bound, CondensedSum
from veilspan.accounting.engines.discretise import GridLoss
from veilspan.accounting.engines.protocol import EngineError
from veilspan.accounting.engines.split import Split, Term, groups_of
from veilspan.accounting.engines.tilted import Part, TiltedSum, Wanted, chernoff, cut

_LARGEST_ERROR = 10  # times the error that is wanted; above it another tilt is tried
_ROUNDS, _GAINED = 5, 1e-3  # of tilts; what another one has to change
_OF_CHERNOFF = 0.8  # of Chernoff's bound, where nothing is known of ε
_COARSENED = 1.25  # times the room that a sum may need and be put on a coarser grid, not split
_STEEP = 0.1  # most change of a tilt's logarithm from one grid point to the next
# Points of a condensed sum, at least, and from which on it has as many as any other.
_LEAST_CONDENSED, _ALL_FROM = 1 << 14, 1 << 20
_SMALL = 1 << 16  # points of a transform that takes no time to speak of
_HIGHER = 30  # numbers above all windows that are tried
_NEXT_TO_NOTHING = 1e-9  # of the largest loss
_RELATIVE = 1e-13  # to which ε is found
# Shares of the guess, and of the largest loss, at which a lower bound is looked for.
_NEAR = (1.0, 1.04, 0.99, 0.97, 0.9, 0.8, 0.6, 0.4, 0.2)
_BELOW = tuple(0.8**power for power in range(1, 60))


class Composition:
    """The loss of independent releases, prepared for questions near one δ.

    Args:
        parts: The loss of one release and the number of such releases, at least 1, for each kind;
            all on grids of one spacing.
        delta: The δ at which ε will be asked, or about which δ will be found.
        bound: From above ("upper") or below ("lower"), as the parts bound the releases.
        largest_transform: Most grid points that a transform may have.
        guess: About where ε lies, rather too small than too large; `None` for no idea. Affects
            precision and cost only.
        wanted_error: Of δ, relative, for the choice of the tilt: less takes a wider window.

    Attributes:
        step_spacing: Of the grid of the parts.

    Raises:
        WindowTooWideError: If a transform would need more points; carries the spacing that fits.
    """

    def __init__(
        self,
        parts: Sequence[tuple[GridLoss, int]],
        delta: float,
        bound: Bound,
        *,
        largest_transform: int,
        guess: float | None = None,
        wanted_error: float = 1e-4,
    ) -> None:
        assert len({grid.spacing for grid, _ in parts}) == 1
        self._parts = [_finite(grid, steps) for grid, steps in parts]
        self.step_spacing = self._parts[0].place[1]
        # The masses of the finite losses are not divided by their sum, so this is just added.
        log_finite = sum(steps * math.log1p(-grid.infinite) for grid, steps in parts)
        self._infinite = -math.expm1(log_finite)
        self._bound: Bound = bound
        self._delta, self._room = delta, largest_transform
        self._wanted_error = wanted_error
        self._split: Split | None = None
        self._terms: list[TiltedSum | CondensedSum] = []
        self._prepare(guess)

    def epsilon(self) -> float:
        """Return the smallest ε at which δ is at most the given one, errors on the safe side."""
        upper = self._bound == "upper"
        best = math.inf if upper else 0.0
        for _ in range(_ROUNDS):  # every tilt gives a valid bound
            found = self._solve_upper() if upper else self._solve_lower()
            gained = abs(found - best) > _GAINED * found or found == 0
            best = min(best, found) if upper else max(best, found)
            if not gained or self._sharp(best) or not self._again(best):
                break
        return best

    def delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`, errors added to an upper bound and taken off a lower one."""
        return min(self._total(epsilon) * self._delta, 1.0)

    def error(self, epsilon: float) -> float:
        """Return what is charged to δ(ε) for mass that is misplaced, relative to δ."""
        return sum(term.error(epsilon) for term in self._terms)

    def widened(self, epsilon: float) -> float:
        """Return about how much the grids add to an ε, relatively.

        A loss that is moved to grid points h apart adds about h²/8 times its second derivative to
        δ(ε). Of a lower bound, rare losses that have no neighbours are lowered, by h/2.
        """
        near = 1.02 * epsilon
        change = math.log(max(self._total(epsilon), 1e-20) / max(self._total(near), 1e-20))
        squares = sum(part.steps for part in self._parts) * self.step_spacing**2
        squares += max(term.moves * term.spacing**2 for term in self._terms)
        add = change / (near - epsilon) * squares / 8
        if self._bound == "lower":
            add += max(term.alone * term.spacing for term in self._terms) / 2
        return add / epsilon

    def _sharp(self, epsilon: float) -> bool:
        return self.error(epsilon) <= _LARGEST_ERROR * self._wanted_error

    def _again(self, epsilon: float) -> bool:
        """Tilt for an ε that has been found, and return whether that was possible."""
        if epsilon == 0 and self._bound == "upper":
            return False
        # Errors hide a lower bound that is far below the guess.
        guess = self._guess / 4 if epsilon == 0 else 0.95 * epsilon
        try:
            self._prepare(guess)
        except WindowTooWideError:
            return False
        return True

    def _prepare(self, guess: float | None) -> None:
        """Choose tilts for a guess, of the losses as they are or of a split of them.

        Raises:
            WindowTooWideError: If neither fits.
        """
        log_delta = math.log(self._delta)
        if guess is None:
            guess = _OF_CHERNOFF * max(chernoff(self._parts, log_delta), 0.0)
        wanted = Wanted(log_delta=log_delta, guess=guess, error=self._wanted_error)
        room, width = self._room, math.inf
        self._guess = guess
        whole = None
        if self._split is None:
            whole = self._term(Term(self._parts, [], 0.0), wanted)
            charged = whole.error(guess) > _LARGEST_ERROR * self._wanted_error
            width = whole.size
            if width <= room and not charged:
                self._terms, self._beyond = [whole], 0.0
                return
            if width <= _COARSENED * room and not charged:
                raise self._too_wide(width)
        split = Split(self._parts, self._delta) if self._split is None else self._split
        if self._split is None:
            terms = [self._term(term, wanted) for term in split.terms]
        else:
            allowed = self._wanted_error / len(self._terms)
            terms = [
                old if old.error(guess) <= allowed else self._term(term, wanted)
                for old, term in zip(self._terms, split.terms, strict=True)
            ]
        widest = max((term.size for term in terms), default=math.inf)
        if widest <= room:
            self._terms, self._beyond, self._split = terms, split.beyond, split
        elif whole is not None and width <= room:
            self._terms, self._beyond = [whole], 0.0
        else:
            raise self._too_wide(min(width, widest))

    def _too_wide(self, size: float) -> WindowTooWideError:
        return WindowTooWideError(self.step_spacing * 1.05 * size / self._room)

    def _term(self, term: Term, wanted: Wanted) -> TiltedSum | CondensedSum:
        """Return a term on the grid of its parts, or on one that sums of them are moved to."""
        parts, weak = [*term.bulk, *term.rare], bool(term.rare)
        exact = TiltedSum.suited(parts, term.log_weight, wanted, weak=weak)
        room = min(self._room, max(self._room**2 // _ALL_FROM, _LEAST_CONDENSED))
        if exact.size <= max(room, _SMALL) or not term.bulk:
            return exact
        bulk = TiltedSum(term.bulk, 0.0, wanted.log_delta, cut(term.bulk, exact.tilt.theta))
        groups = [(bulk, 1)]
        if bulk.size > self._room and bulk.compact:
            # The width of a sum grows with the root of the number of its terms; errors add up.
            times = math.ceil((2 * bulk.size / self._room) ** 2)
            finer = replace(wanted, error=wanted.error / 2 / times)
            exact = TiltedSum.suited(parts, term.log_weight, finer, weak=weak)
            theta = exact.tilt.theta
            groups = [
                (TiltedSum(some, 0.0, wanted.log_delta, cut(some, theta)), count)
                for some, count in groups_of(term.bulk, times)
            ]
        elif not term.rare:
            return exact
        spacing = exact.spacing * 1.05 * exact.size / room
        largest = max(group.size for group, _ in groups)
        if spacing * exact.tilt.theta > _STEEP or largest > self._room:
            return exact
        return CondensedSum(exact, groups, term.rare, spacing=spacing, bound=self._bound)

    def _total(self, epsilon: float) -> float:
        """Return δ(ε) in units of the given δ."""
        sign = 1 if self._bound == "upper" else -1
        beyond = self._infinite + (self._beyond if sign > 0 else 0.0)
        return beyond / self._delta + sum(term.delta(epsilon, sign) for term in self._terms)

    def _exceeds(self, epsilon: float) -> bool:
        return self._total(epsilon) > 1

    def _solve_upper(self) -> float:
        high = self._largest_loss()
        if not self._exceeds(0.0):
            return 0.0
        for _ in range(_HIGHER):  # above all windows errors are left, and fall
            if not self._exceeds(high):
                break
            high *= 1.5
        else:
            return math.inf
        start = min(self._guess, high)
        low, high = _bracket(self._exceeds, start, high)
        epsilon, step = self._root(low, high), _RELATIVE
        while self._exceeds(epsilon):  # by rounding
            epsilon, step = min(epsilon * (1 + step), high), 2 * step
        return epsilon

    def _solve_lower(self) -> float:
        high = self._largest_loss()
        if self._exceeds(high):
            return high
        near = [share * self._guess for share in _NEAR]
        # Errors may hide δ where ε is small: any ε that is found to be too small will do.
        for start in [*near, *(share * high for share in _BELOW)]:
            if start < high and self._exceeds(start):
                low, high = _bracket(self._exceeds, start, high)
                epsilon, step = self._root(low, high), _RELATIVE
                while not self._exceeds(epsilon):  # by rounding
                    epsilon, step = max(epsilon * (1 - step), low), 2 * step
                return epsilon
        return 0.0

    def _root(self, low: float, high: float) -> float:
        def excess(epsilon: float) -> float:
            return math.log(min(max(self._total(epsilon), 1e-20), 1e20))

        for end in (low, high):
            if excess(end) == 0:
                return end
        find: Any = brentq  # its annotations want NumPy's numbers
        root = find(excess, low, high, xtol=1e-300, rtol=_RELATIVE)
        return float(root)

    def _largest_loss(self) -> float:
        return max(max(term.last_loss for term in self._terms), self.step_spacing)


class WindowTooWideError(EngineError):
    """The grid is too fine for the composed loss; `spacing` is one that fits."""

    def __init__(self, spacing: float) -> None:
        super().__init__(f"the transform needs a spacing of at least {spacing:.3g}")
        self.spacing = spacing


def _finite(grid: GridLoss, steps: int) -> Part:
    occupied = grid.mass > 0
    place = grid.origin, grid.spacing
    return Part(place, grid.index[occupied], np.log(grid.mass[occupied]), steps)


def _bracket(below: Callable[[float], bool], start: float, high: float) -> tuple[float, float]:
    """Return a short interval whose ends are below and not below what is looked for.

    Args:
        below: Whether a number is; 0 is, and `high` is not.
        start: About where it lies.
        high: Where it surely does not lie any more.
    """
    factor, start = 1.08, max(start, _NEXT_TO_NOTHING * high)
    other = start
    if below(start):
        while True:
            start, other = other, min(other * factor, high)
            if other == high or not below(other):
                return start, other
            factor **= 2
    while True:
        start, other = other, other / factor
        if other < _NEXT_TO_NOTHING * high:
            return 0.0, start
        if below(other):
            return other, start
        factor **= 2
