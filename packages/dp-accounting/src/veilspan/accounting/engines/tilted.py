"""The sum of independent losses by one exponentially tilted Fourier transform.

A plain transform has rounding errors of about 1e-16 of the total mass, which drown a δ of 1e-12.
Here every atom is first multiplied by exp(θ · loss), which moves the bulk of the distribution
towards the mass that decides δ, so that all errors become small against δ itself. Tilting back
multiplies by exp(K(θ) - θ · loss), and dividing by δ on the way keeps that factor moderate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft as scipy_fft

from veilspan.accounting.engines.one_step import Array
from veilspan.accounting.engines.table import LARGEST_EXPONENT, Table

fft: Any = scipy_fft  # its dispatchers are annotated with what they dispatch on

# Tilted mass that may lie outside the transform's window on either side, at least; charged to δ.
_OUTSIDE = 1e-12
# Rounding of the transform and of the repeated squaring, as tilted mass; charged to δ.
_ROUNDING = 1e-12
_ROUNDING_PER_STEP = 1e-15
# Logarithm below which a frequency of the sum is far under rounding.
_NEGLIGIBLE = -60.0
_COMPACT = 20  # standard deviations
# Tilts that are tried, and tried again around the best of them.
_ORDERS_PER_DECADE, _CLOSER = 2, 10
_SHOWS, _MOST = 1e-3, 1e-4  # of the error that is wanted; most tilted mass outside a window


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a tilt is chosen for.

    Args:
        log_delta: Logarithm of the δ that counts as 1.
        guess: About where ε lies, rather too small than too large.
        error: Of δ, relative: less takes a wider window.
    """

    log_delta: float
    guess: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """How a sum is tilted, and the window that it is cut to.

    Args:
        theta: θ, above 0.
        low: Loss below which the tilted sum has at most `outside` mass.
        high: Loss above which it has at most `outside` mass.
        outside: Share of all tilted mass.
    """

    theta: float
    low: float
    high: float
    outside: float


class Part:
    """The finite losses of one kind of release, or some of them, and how often they happen.

    Args:
        place: Origin and spacing of the grid.
        index: Grid index of each atom, increasing.
        log_mass: Logarithm of each atom's probability; these need not add up to 1.
        steps: How often, at least 1.
    """

    def __init__(
        self, place: tuple[float, float], index: NDArray[np.int64], log_mass: Array, steps: int
    ) -> None:
        self.place, self.index, self.log_mass, self.steps = place, index, log_mass, steps
        self.loss = place[0] + place[1] * index

    def some(self, kept: slice, steps: int) -> Part:
        """Return some of the losses."""
        return Part(self.place, self.index[kept], self.log_mass[kept], steps)

    def tilted(self, theta: float) -> Array:
        """Return the mass of each atom after tilting; they add up to 1."""
        exponent = theta * self.loss + self.log_mass
        return np.exp(exponent - self.log_moments(np.array([theta])))

    def log_moments(self, order: Array) -> Array:
        """Return log E[exp(order · loss)] of one finite loss, for each order."""
        exponent = order[:, None] * self.loss + self.log_mass
        peak = exponent.max(axis=1, keepdims=True)
        return peak[:, 0] + np.log(np.exp(exponent - peak).sum(axis=1))

    def variance(self, order: float) -> float:
        """Return the variance of one loss after tilting by `order`."""
        exponent = order * self.loss + self.log_mass
        weight = np.exp(exponent - exponent.max())
        weight /= weight.sum()
        return float(np.dot(weight, (self.loss - np.dot(weight, self.loss)) ** 2))

    def transform(self, theta: float, size: int) -> np.ndarray:
        """Return the Fourier transform of one tilted loss, wrapped to `size` points."""
        weight = self.tilted(theta)
        return fft.rfft(np.bincount(self.index % size, weights=weight, minlength=size))


class TiltedSum:
    """The sum of all losses of some parts, tilted.

    Args:
        parts: At least one, all on grids of one spacing.
        log_weight: Logarithm of a factor of all masses.
        log_delta: Logarithm of the δ that counts as 1.
        tilt: How it is tilted.

    Attributes:
        size: Grid points that the transform needs.
        spacing: Of the grid.
        tilt: How it is tilted.
        log_moment: Logarithm of the weighted mean of exp(θ · sum).
        charge: Share of the tilted mass that may be misplaced.
        moves: How many losses were moved to a coarser grid: none.
        alone: How many of these have no neighbours: none.
    """

    moves = alone = 0

    def __init__(
        self, parts: Sequence[Part], log_weight: float, log_delta: float, tilt: Tilt
    ) -> None:
        (self.spacing,) = {part.place[1] for part in parts}
        self._parts, self.tilt = parts, tilt
        self.log_weight, self.log_delta = log_weight, log_delta
        self._origin = sum(part.steps * part.place[0] for part in parts)
        self.log_moment = log_weight + float(_log_moments(parts, np.array([tilt.theta]))[0])
        self._log_scale = self.log_moment - log_delta
        self.charge = 2 * tilt.outside + _rounding(parts)
        self._first = math.floor((tilt.low - self._origin) / self.spacing) - 1
        last = math.ceil((tilt.high - self._origin) / self.spacing) + 1
        self.size = last - self._first + 1
        self._table: Table | None = None

    @classmethod
    def suited(
        cls, parts: Sequence[Part], log_weight: float, wanted: Wanted, *, weak: bool = False
    ) -> TiltedSum:
        """Return the sum with the tilt that suits what is wanted.

        The tilt decides how precise answers are, never whether they hold. It is the weakest that
        keeps errors small against δ at the guess, as weak tilts have light tails, or, unless it has
        to be `weak`, the one with the smallest errors, as that allows more mass outside: whichever
        has the narrower window.
        """
        log_charge = math.log(2 * _OUTSIDE + _rounding(parts)) + log_weight - wanted.log_delta
        orders = _orders(_spread(parts, 0.0))
        candidates: list[float] = []
        weakest = float(orders[0])
        for _ in range(2):  # closer around the best of a few
            log_error = log_charge + _log_moments(parts, orders) - orders * wanted.guess
            small = np.flatnonzero(log_error <= math.log(wanted.error))
            least = int(np.argmin(log_error))
            first = int(small[0]) if len(small) else least
            if len(small) and not candidates and not weak:
                candidates.append(float(orders[least]))
            weakest = float(orders[first])
            after = min(first + (0 if len(small) else 1), len(orders) - 1)
            orders = np.geomspace(orders[max(first - 1, 0)], orders[after], _CLOSER)
        candidates.append(weakest)
        log_factor = log_weight - wanted.log_delta

        def tilted(theta: float) -> Tilt:
            log_moment = float(_log_moments(parts, np.array([theta]))[0])
            exponent = log_factor + log_moment - theta * wanted.guess
            outside = _SHOWS * wanted.error * math.exp(-max(exponent, -50.0))
            return cut(parts, theta, min(max(outside, _OUTSIDE), _MOST))

        tilts = [tilted(theta) for theta in dict.fromkeys(candidates)]
        tilt = min(tilts, key=lambda tilt: tilt.high - tilt.low)
        return cls(parts, log_weight, wanted.log_delta, tilt)

    @property
    def compact(self) -> bool:
        """Return whether the window is hardly wider than that of a normal distribution."""
        width = self.tilt.high - self.tilt.low
        return width <= _COMPACT * _spread(self._parts, self.tilt.theta)

    def factor(self, epsilon: float) -> float:
        """Return how much, at most, tilted mass above ε adds to δ(ε), in units of δ."""
        exponent = self._log_scale - self.tilt.theta * epsilon
        return math.inf if exponent > LARGEST_EXPONENT else math.exp(exponent)

    def error(self, epsilon: float) -> float:
        """Return what is charged to δ(ε) for mass that is misplaced, in units of δ."""
        return self.charge * self.factor(epsilon)

    def delta(self, epsilon: float, sign: int) -> float:
        """Return δ(ε) from above (`sign` +1) or below (-1), in units of δ.

        Whatever mass is missing or misplaced counts most right above ε: the factor of tilting back
        falls with the loss.
        """
        error = self.error(epsilon)
        if math.isinf(error):
            return math.inf if sign > 0 else 0.0
        if self._table is None:
            scale = self.tilt.theta, self._log_scale
            self._table = Table(self.transform(), self.first_loss, self.spacing, scale)
        return max(self._table.delta(epsilon) + sign * error, 0.0)

    @property
    def first_loss(self) -> float:
        """Return the smallest loss of the window."""
        return self._origin + self.spacing * self._first

    @property
    def last_loss(self) -> float:
        """Return the largest loss of the window."""
        return self.first_loss + self.spacing * self.size

    def transform(self) -> Array:
        """Return the tilted mass of the sum at grid points from `first_loss` on."""
        size = fft.next_fast_len(max(self.size, 64), real=True)
        transforms = [part.transform(self.tilt.theta, size) for part in self._parts]
        # Frequencies that vanish in the product need not be raised to their powers.
        kept = np.full(len(transforms[0]), True)
        for part, transform in zip(self._parts, transforms, strict=True):
            kept &= np.abs(transform) > math.exp(_NEGLIGIBLE / part.steps)
        product = np.zeros_like(transforms[0])
        product[kept] = 1.0
        for part, transform in zip(self._parts, transforms, strict=True):
            product[kept] *= _power(transform[kept], part.steps)
        tilted = np.roll(fft.irfft(product, size), -(self._first % size))
        return np.maximum(tilted, 0.0)


def chernoff(parts: Sequence[Part], log_delta: float) -> float:
    """Return about the least ε of which Chernoff's bound says that its δ is below the given one."""
    orders = _orders(_spread(parts, 0.0))
    return float(np.min((_log_moments(parts, orders) - log_delta) / orders))


def cut(parts: Sequence[Part], theta: float, outside: float = _OUTSIDE) -> Tilt:
    """Return a tilt with the window that has at most this share of the mass on either side."""
    spread = _spread(parts, theta)
    # Weak shifts serve losses that are rare and large against the spread.
    shift = np.concatenate(
        [np.geomspace(0.3, 60.0, 14) / spread, np.geomspace(0.3, max(0.3 / spread, 0.4), 7)]
    )
    moments = _log_moments(parts, theta + np.concatenate([[0.0], shift, -shift]))
    above, below = np.split(moments[1:] - moments[0], 2)
    log_outside = math.log(outside)
    return Tilt(
        theta=theta,
        low=float(np.max((log_outside - below) / shift)),
        high=float(np.min((above - log_outside) / shift)),
        outside=outside,
    )


def _orders(spread: float) -> Array:
    """Return tilts from which one is chosen, for a sum of this standard deviation."""
    weakest, strongest = min(1e-2 / spread, 1e-2), 1e3 / spread
    count = int(_ORDERS_PER_DECADE * math.log10(strongest / weakest)) + 2
    return np.geomspace(weakest, strongest, count)


def _rounding(parts: Sequence[Part]) -> float:
    return _ROUNDING + _ROUNDING_PER_STEP * sum(part.steps for part in parts)


def _log_moments(parts: Sequence[Part], order: Array) -> Array:
    """Return log E[exp(order · sum)], for each order."""
    total = np.zeros(len(order))
    for part in parts:
        total += part.steps * part.log_moments(order)
    return total


def _spread(parts: Sequence[Part], order: float) -> float:
    """Return the standard deviation of the sum after tilting by `order`."""
    variance = sum(part.steps * part.variance(order) for part in parts)
    return max(math.sqrt(variance), parts[0].place[1])


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """Return `base ** exponent` by repeated squaring: faster than complex logarithms."""
    result = None
    while True:
        if exponent & 1:
            result = base.copy() if result is None else result * base
        exponent >>= 1
        if not exponent:
            assert result is not None
            return result
        base = base * base
