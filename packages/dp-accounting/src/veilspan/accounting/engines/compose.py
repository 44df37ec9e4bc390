"""The sum of many independent losses, by one exponentially tilted Fourier transform.

A plain transform has rounding errors of about 1e-16 of the total mass, which drown a δ of 1e-12.
Here every atom is first multiplied by exp(θ · loss), which moves the bulk of the distribution
towards the mass that decides δ, so that all errors become small against δ itself. Tilting back
multiplies by exp(K(θ) - θ · loss), and dividing by δ on the way keeps that factor moderate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from scipy import fft as scipy_fft
from scipy.linalg import solve_banded

from veilspan.accounting.engines.discretise import GridLoss
from veilspan.accounting.engines.one_step import Array
from veilspan.accounting.engines.protocol import EngineError

fft: Any = scipy_fft  # its dispatchers are annotated with what they dispatch on

# Tilted mass that may lie outside the transform's window on either side; charged to δ.
_OUTSIDE = 1e-12
# Rounding of the transform and of the repeated squaring, as tilted mass; charged to δ.
_ROUNDING = 1e-12
_ROUNDING_PER_STEP = 1e-15
_LARGEST_CHARGE = 10  # times the error that is wanted; above it another tilt is tried
_TILTS = 8

_Flaw = Literal["none", "below window", "charged"]
_LARGEST_EXPONENT = 600.0
# Logarithm below which a frequency of the sum is far under rounding.
_NEGLIGIBLE = -60.0


class _Part:
    """The finite losses of one kind of release, and how often it happens."""

    def __init__(self, grid: GridLoss, steps: int) -> None:
        occupied = grid.mass > 0
        self.index, self.mass = grid.index[occupied], grid.mass[occupied]
        self.loss = grid.loss[occupied]
        self.log_mass = np.log(self.mass)
        self.steps = steps
        # log(1 - probability that any of the steps has an infinite loss)
        self.log_finite = steps * math.log1p(-grid.infinite)

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
        exponent = theta * self.loss + self.log_mass
        weight = np.exp(exponent - self.log_moments(np.array([theta])))
        return fft.rfft(np.bincount(self.index % size, weights=weight, minlength=size))


class Composition:
    """The loss of independent releases, prepared for questions near one δ.

    Args:
        parts: The loss of one release and the number of such releases, at least 1, for each kind;
            all on grids of one spacing.
        delta: The δ at which ε will be asked, or about which δ will be found.
        largest_transform: Most grid points the transform may have.
        guess: About where ε lies, rather too small than too large; `None` for no idea. Affects
            precision and cost only.
        wanted_error: Of δ, relative, for the choice of the tilt: less takes a wider window.

    Raises:
        WindowTooWideError: If the transform would need more points; carries the spacing that fits.
    """

    def __init__(
        self,
        parts: Sequence[tuple[GridLoss, int]],
        delta: float,
        *,
        largest_transform: int,
        guess: float | None = None,
        wanted_error: float = 1e-4,
    ) -> None:
        (self._spacing,) = {grid.spacing for grid, _ in parts}
        self._parts = [_Part(grid, steps) for grid, steps in parts]
        self._origin = sum(steps * grid.origin for grid, steps in parts)
        self._steps = sum(steps for _, steps in parts)
        # The masses of the finite losses are not divided by their sum, so this is just added.
        self._infinite = -math.expm1(sum(part.log_finite for part in self._parts))
        self._log_delta = math.log(delta)
        self._largest_transform = largest_transform
        self._wanted_error = wanted_error
        self._charge = 2 * _OUTSIDE + _ROUNDING + _ROUNDING_PER_STEP * self._steps
        # Without a guess the tilt is the strongest that makes sense.
        self._stronger = 0.25 if guess is None else 2.0
        self._tilt(self._best_tilt(guess))

    def upper_epsilon(self) -> float:
        """Return the smallest ε at which δ, errors added, is at most the given one."""
        best = math.inf
        for epsilon in self._answers(+1):
            best = min(best, epsilon)  # every tilt gives a valid bound
        return best

    def lower_epsilon(self) -> float:
        """Return the largest ε at which δ, errors taken off, is still above the given one."""
        return max(self._answers(-1))

    def _answers(self, sign: int) -> Iterator[float]:
        """Yield valid bounds under other tilts, until one is sharp."""
        for _ in range(_TILTS):
            epsilon, flaw = self._epsilon(sign)
            yield epsilon
            if flaw == "none":
                return
            try:
                self._tilt(self._theta * (0.25 if flaw == "below window" else self._stronger))
            except WindowTooWideError:
                return

    def upper_delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`, errors added."""
        return self._delta(epsilon, +1)

    def lower_delta(self, epsilon: float) -> float:
        """Return δ at `epsilon`, errors taken off."""
        return self._delta(epsilon, -1)

    def _delta(self, epsilon: float, sign: int) -> float:
        """Return δ(ε) from above (`sign` +1) or below (-1)."""
        log_scale = self._log_moment - self._log_delta
        if log_scale - self._theta * epsilon > _LARGEST_EXPONENT:
            return 1.0 if sign > 0 else 0.0
        begin = max(0, math.floor((epsilon - self._origin) / self._spacing) - self._first)
        loss = self._losses()[begin:]
        weight = self._tilted[begin:] * np.exp(log_scale - self._theta * loss)
        gain = -np.expm1(np.minimum(epsilon - loss, 0.0))
        # As in `_invert`, whatever is missing or misplaced lies above ε.
        charge = sign * self._charge * math.exp(log_scale - self._theta * epsilon)
        finite = max(float(np.dot(weight, gain)) + charge, 0.0) * math.exp(self._log_delta)
        return min(finite + self._infinite, 1.0)

    def _log_moments(self, order: Array) -> Array:
        """Return log E[exp(order · loss)] of the sum of all finite losses, for each order."""
        return sum(
            (part.steps * part.log_moments(order) for part in self._parts), np.zeros(len(order))
        )

    def _best_tilt(self, guess: float | None) -> float:
        """Return a tilt; it decides how precise the answer is, never whether it holds.

        Without a guess it is the θ of the best Chernoff bound on ε, (K(θ) - log δ)/θ. With one, it
        is the smallest θ that keeps errors small against δ at the guess: weak tilts have light
        tails, and light tails a narrow window.
        """
        weakest, strongest = min(1e-2 / self._spread(0.0), 1e-2), 1e3 / self._spread(0.0)
        orders = np.geomspace(weakest, strongest, int(12 * math.log10(strongest / weakest)) + 2)
        log_tail = self._log_moments(orders) - self._log_delta
        if guess is None:
            return float(orders[np.argmin(log_tail / orders)])
        log_error = math.log(self._charge) + log_tail - orders * guess
        small = np.flatnonzero(log_error <= math.log(self._wanted_error))
        return float(orders[small[0] if len(small) else np.argmin(log_error)])

    def _spread(self, order: float) -> float:
        """Return the standard deviation of the composed loss after tilting by `order`."""
        variance = sum(part.steps * part.variance(order) for part in self._parts)
        return max(math.sqrt(variance), self._spacing)

    def _tilt(self, theta: float) -> None:
        """Tilt by `theta` and transform."""
        self._theta = theta
        self._log_moment = float(self._log_moments(np.array([theta]))[0])
        low, high = self._window()
        self._first = math.floor((low - self._origin) / self._spacing) - 1
        last = math.ceil((high - self._origin) / self._spacing) + 1
        size = last - self._first + 1
        if size > self._largest_transform:
            raise WindowTooWideError(self._spacing * 1.05 * size / self._largest_transform)
        self._tilted = self._transform(size)

    def _window(self) -> tuple[float, float]:
        """Return losses below and above which the tilted sum has at most `_OUTSIDE` mass each."""
        spread = self._spread(self._theta)
        # Weak shifts serve losses that are rare and large against the spread.
        shift = np.concatenate(
            [np.geomspace(0.3, 60.0, 32) / spread, np.geomspace(0.3, max(0.3 / spread, 0.4), 12)]
        )
        centre = self._log_moments(np.array([self._theta]))
        above = self._log_moments(self._theta + shift) - centre
        below = self._log_moments(self._theta - shift) - centre
        log_outside = math.log(_OUTSIDE)
        high = float(np.min((above - log_outside) / shift))
        low = float(np.max((log_outside - below) / shift))
        return low, high

    def _transform(self, size: int) -> Array:
        """Return the tilted mass of the sum at grid points `_first` and above."""
        size = fft.next_fast_len(max(size, 64), real=True)
        transforms = [part.transform(self._theta, size) for part in self._parts]
        # Frequencies that vanish in the product need not be raised to their powers.
        kept = np.full(len(transforms[0]), True)
        for part, transform in zip(self._parts, transforms, strict=True):
            kept &= np.abs(transform) > math.exp(_NEGLIGIBLE / part.steps)
        product = np.zeros_like(transforms[0])
        product[kept] = 1.0
        for part, transform in zip(self._parts, transforms, strict=True):
            product[kept] *= _power(transform[kept], part.steps)
        tilted = np.roll(fft.irfft(product, size), -(self._first % size))
        if not np.isfinite(tilted).all():
            raise EngineError("the Fourier transform of the loss overflowed")
        return np.maximum(tilted, 0.0)

    def _losses(self) -> Array:
        """Return the loss at each point of the window."""
        return self._origin + self._spacing * (self._first + np.arange(len(self._tilted)))

    def _epsilon(self, sign: int) -> tuple[float, _Flaw]:
        """Return ε from above (`sign` +1) or below (-1) and what keeps it from being sharp."""
        target = 1 - self._infinite * math.exp(-self._log_delta)
        if target <= 0:
            return (math.inf if sign > 0 else 0.0), "none"
        # Below this a weight could overflow.
        log_scale = self._log_moment - self._log_delta
        floor = max(0.0, (log_scale - _LARGEST_EXPONENT) / self._theta)
        loss = self._losses()
        begin = int(np.searchsorted(loss, floor))
        if begin == len(loss):
            return (floor if sign > 0 else 0.0), "none" if floor == 0 else "below window"
        return self._invert(loss[begin:], self._tilted[begin:], target, sign)

    def _invert(self, loss: Array, tilted: Array, target: float, sign: int) -> tuple[float, _Flaw]:
        """Solve Σ w (1 - e^(ε - loss)) = target for ε; weights and target in units of δ."""
        untilt = np.exp(self._log_moment - self._log_delta - self._theta * loss)
        weight = tilted * untilt
        above = np.cumsum(weight[::-1])[::-1]
        discounted = _discounted_sums(weight, self._spacing)
        # Mass outside the window, mass that wrapped around into it, and rounding, either way.
        allowed = target - sign * self._charge * untilt
        exceeds = np.flatnonzero(above - discounted > allowed)
        if len(exceeds) == 0:
            flaw: _Flaw = "none" if loss[0] <= self._spacing else "below window"
            return (max(float(loss[0]), 0.0) if sign > 0 else 0.0), flaw
        k = int(exceeds[-1])
        if k + 1 == len(loss):
            return (math.inf if sign > 0 else float(loss[-1])), "charged"
        sharp = self._charge * untilt[k] < _LARGEST_CHARGE * self._wanted_error
        flaw = "none" if sharp else "charged"
        # Within (loss[k], loss[k+1]] the charge is at most what it is at loss[k].
        excess = above[k + 1] - allowed[k]
        if excess <= 0 or discounted[k + 1] <= 0:
            return float(loss[k + 1] if sign > 0 else loss[k]), flaw
        root = float(loss[k + 1]) + math.log(excess) - math.log(discounted[k + 1])
        return min(max(root, float(loss[k])), float(loss[k + 1])), flaw


class WindowTooWideError(EngineError):
    """The grid is too fine for the composed loss; `spacing` is one that fits."""

    def __init__(self, spacing: float) -> None:
        super().__init__(f"the transform needs a spacing of at least {spacing:.3g}")
        self.spacing = spacing


def _discounted_sums(weight: Array, spacing: float) -> Array:
    """Return Σ_{j ≥ k} w_j e^(-(j - k) · spacing) for each k, by backward substitution."""
    bands = np.vstack([np.full(len(weight), -math.exp(-spacing)), np.ones(len(weight))])
    sums: Any = solve_banded((0, 1), bands, weight, overwrite_b=False, check_finite=False)
    return sums


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
