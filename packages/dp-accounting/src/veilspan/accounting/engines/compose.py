"""The sum of many independent losses, by one exponentially tilted Fourier transform.

A plain transform has rounding errors of about 1e-16 of the total mass, which drown a δ of 1e-12.
Here every atom is first multiplied by exp(θ · loss) with the θ of the best Chernoff bound: the mass
that decides δ becomes the bulk of the tilted distribution, so all errors are relative to δ.
All weights below are in units of δ at `reference`, the Chernoff bound on ε: tilting back means
multiplying by exp(-θ (loss - reference)), which neither overflows nor underflows where it matters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import fft as scipy_fft

from veilspan.accounting.engines.discretise import GridLoss
from veilspan.accounting.engines.one_step import Array
from veilspan.accounting.engines.protocol import EngineError

fft: Any = scipy_fft  # its dispatchers are annotated with what they dispatch on

# Tilted mass that may lie outside the transform's window on either side; charged to δ.
_OUTSIDE = 1e-12
# Rounding of the transform and of the repeated squaring, relative to δ; charged to δ.
_ROUNDING = 1e-9
_ROUNDING_PER_STEP = 1e-14
_LARGEST_EXPONENT = 600.0
# Logarithm below which a frequency of the sum is far under rounding.
_NEGLIGIBLE = -60.0


class Composition:
    """The loss of `steps` independent releases, prepared for questions near one δ.

    Args:
        grid: Loss of one release.
        steps: Number of releases, at least 1.
        delta: The δ at which ε will be asked; sets the tilt, which affects precision only.
        largest_transform: Most grid points the transform may have.

    Raises:
        WindowTooWideError: If the transform would need more points; carries the spacing that fits.
    """

    def __init__(self, grid: GridLoss, steps: int, delta: float, *, largest_transform: int) -> None:
        self._spacing, self._steps = grid.spacing, steps
        occupied = grid.mass > 0
        self._index, self._mass = grid.index[occupied], grid.mass[occupied]
        self._origin = grid.origin
        self._loss = grid.loss[occupied]
        # log(1 - probability that any of the steps had an infinite loss)
        self._log_finite = steps * math.log1p(-grid.infinite)
        self._log_delta = math.log(delta)
        self._find_tilt()
        low, high = self._window()
        self._first = math.floor((low - steps * self._origin) / self._spacing) - 1
        last = math.ceil((high - steps * self._origin) / self._spacing) + 1
        size = last - self._first + 1
        if size > largest_transform:
            raise WindowTooWideError(self._spacing * 1.05 * size / largest_transform)
        self._tilted = self._transform(size)

    def upper_epsilon(self) -> float:
        """Return the smallest ε at which δ, errors added, is at most the given one."""
        return self._epsilon(+1)

    def lower_epsilon(self) -> float:
        """Return the largest ε at which δ, errors taken off, is still above the given one."""
        return self._epsilon(-1)

    def _log_moments(self, order: Array) -> Array:
        """Return log E[exp(order · loss)] of one finite loss, for each order."""
        exponent = order[:, None] * self._loss + np.log(self._mass)
        peak = exponent.max(axis=1, keepdims=True)
        return peak[:, 0] + np.log(np.exp(exponent - peak).sum(axis=1))

    def _spread(self, order: float) -> float:
        """Return the standard deviation of the composed loss after tilting by `order`."""
        exponent = order * self._loss + np.log(self._mass)
        weight = np.exp(exponent - exponent.max())
        weight /= weight.sum()
        centred = self._loss - np.dot(weight, self._loss)
        variance = float(np.dot(weight, centred**2))
        return max(math.sqrt(variance * self._steps), self._spacing)

    def _find_tilt(self) -> None:
        """Choose θ by the Chernoff bound on ε: (K(θ) - log δ)/θ, smallest over θ."""
        orders = np.geomspace(1e-2, 1e3, 48) / self._spread(0.0)
        for points in (24, 0):
            bound = (self._steps * self._log_moments(orders) - self._log_delta) / orders
            best = int(np.argmin(bound))
            if points:
                near = orders[max(best - 1, 0)], orders[min(best + 1, len(orders) - 1)]
                orders = np.geomspace(*near, points)
        self._theta, self._reference = float(orders[best]), float(bound[best])

    def _window(self) -> tuple[float, float]:
        """Return losses below and above which the tilted sum has at most `_OUTSIDE` mass each."""
        shift = np.geomspace(0.3, 60.0, 32) / self._spread(self._theta)
        centre = self._log_moments(np.array([self._theta]))
        above = self._steps * (self._log_moments(self._theta + shift) - centre)
        below = self._steps * (self._log_moments(self._theta - shift) - centre)
        log_outside = math.log(_OUTSIDE)
        high = float(np.min((above - log_outside) / shift))
        low = float(np.max((log_outside - below) / shift))
        return low, high

    def _transform(self, size: int) -> Array:
        """Return the tilted mass of the sum at grid points `_first` and above."""
        size = fft.next_fast_len(max(size, 64), real=True)
        exponent = self._theta * self._loss + np.log(self._mass)
        weight = np.exp(exponent - self._log_moments(np.array([self._theta])))
        wrapped = np.bincount(self._index % size, weights=weight, minlength=size)
        transform = fft.rfft(wrapped)
        # Frequencies that vanish in the power need not be raised to it.
        kept = np.abs(transform) > math.exp(_NEGLIGIBLE / self._steps)
        power = np.zeros_like(transform)
        power[kept] = _power(transform[kept], self._steps)
        tilted = np.roll(fft.irfft(power, size), -(self._first % size))
        if not np.isfinite(tilted).all():
            raise EngineError("the Fourier transform of the loss overflowed")
        return np.maximum(tilted, 0.0)

    def _epsilon(self, sign: int) -> float:
        """Return ε from above (`sign` +1) or from below (-1)."""
        any_infinite = -math.expm1(self._log_finite)
        target = (1 - any_infinite * math.exp(-self._log_delta)) * math.exp(-self._log_finite)
        target -= sign * (_ROUNDING + _ROUNDING_PER_STEP * self._steps)
        if target <= 0:
            return math.inf if sign > 0 else 0.0
        # Below `floor` a weight could overflow; the tilt keeps the answer far above it.
        floor = max(0.0, self._reference - _LARGEST_EXPONENT / (1 + self._theta))
        point = self._first + np.arange(len(self._tilted))
        loss = self._steps * self._origin + self._spacing * point
        begin = int(np.searchsorted(loss, floor))
        loss, tilted = loss[begin:], self._tilted[begin:]
        if len(loss) == 0:
            return floor if sign > 0 else 0.0
        return self._invert(loss, tilted, target, sign)

    def _invert(self, loss: Array, tilted: Array, target: float, sign: int) -> float:
        """Solve Σ w (1 - e^(ε - loss)) = target for ε; weights and target in units of δ."""
        distance = loss - self._reference
        untilt = np.exp(-self._theta * distance)
        weight = tilted * untilt
        above = np.cumsum(weight[::-1])[::-1]
        discounted = np.cumsum((weight * np.exp(-distance))[::-1])[::-1]
        # Mass outside the window and mass that wrapped around into it: two tails, both ways.
        allowed = target - sign * 2 * _OUTSIDE * untilt
        growth = np.exp(np.minimum(distance, _LARGEST_EXPONENT))
        exceeds = np.flatnonzero(above - growth * discounted > allowed)
        if len(exceeds) == 0:
            return max(float(loss[0]), 0.0) if sign > 0 else 0.0
        k = int(exceeds[-1])
        if k + 1 == len(loss):
            return math.inf if sign > 0 else float(loss[-1])
        # Within (loss[k], loss[k+1]] the outside mass is at most what it is at loss[k].
        excess = above[k + 1] - allowed[k]
        if excess <= 0 or discounted[k + 1] <= 0:
            return float(loss[k + 1]) if sign > 0 else float(loss[k])
        root = self._reference + math.log(excess / discounted[k + 1])
        if sign > 0:
            return min(max(root, float(loss[k])), float(loss[k + 1]))
        return max(min(root, float(loss[k + 1])), float(loss[k]))


class WindowTooWideError(EngineError):
    """The grid is too fine for the composed loss; `spacing` is one that fits."""

    def __init__(self, spacing: float) -> None:
        super().__init__(f"the transform needs a spacing of at least {spacing:.3g}")
        self.spacing = spacing


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
