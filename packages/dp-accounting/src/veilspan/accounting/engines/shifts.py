"""How far a unit moves one release: by its threshold, or by a random multiple of it.

The growth g of an output x is the logarithm of the density ratio of what the record's presence
gives and its absence gives, before sampling. Positions are asked for by g, as the loss increases
with it whatever the shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp, ndtr, ndtri

from veilspan.accounting.engines.norm_law import Atoms
from veilspan.accounting.engines.protocol import EngineError

Array = NDArray[np.floating[Any]]

_TABLE = 256  # points from which Newton's method starts
_ROUNDS = 60
_SETTLED = 1e-9  # a miss of the growth that one more step makes as small as rounding


@dataclass(frozen=True)
class Masses:
    """Probabilities of consecutive cells of the growth, and beyond the last of them.

    Args:
        without: Under N(0, σ²), which the record does not reach.
        shifted: Under the shifted law.
        tail: Both beyond the last cell, losses that count as infinite included.
    """

    without: Array
    shifted: Array
    tail: tuple[float, float]


class Shifts(Protocol):
    """The law of the shift that the record causes if it is in the sample."""

    bounded: bool  # the shift is at most 1: nothing beyond the range of doubles is given up

    def masses(self, growth: Array) -> Masses:
        """Return the probabilities between neighbouring growths; the first may be -inf."""
        ...

    def log_below(self, growth: float) -> tuple[float, float]:
        """Return the logarithms of both probabilities of growths up to this one."""
        ...

    def below(self, growth: float) -> tuple[float, float]:
        """Return both probabilities of growths up to this one."""
        ...

    def growth_passed(self, without: float, shifted: float) -> float:
        """Return a growth that is passed with at most these probabilities."""
        ...


class UnitShift:
    """A contribution that never exceeds its threshold: the shift is 1.

    Args:
        sigma: The noise's standard deviation σ.
    """

    bounded = True

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def position(self, growth: Array) -> Array:
        """Return the output at which the growth has this value."""
        return self.sigma**2 * growth + 0.5

    def masses(self, growth: Array) -> Masses:
        """Return the probabilities between neighbouring growths."""
        x = self.position(growth)
        z = x[-1] / self.sigma
        return Masses(
            without=interval_probability(x / self.sigma),
            shifted=interval_probability((x - 1) / self.sigma),
            tail=(float(ndtr(-z)), float(ndtr(1 / self.sigma - z))),
        )

    def log_below(self, growth: float) -> tuple[float, float]:
        """Return the logarithms of both probabilities of growths up to this one."""
        x = self.sigma**2 * growth + 0.5
        return float(log_ndtr(x / self.sigma)), float(log_ndtr((x - 1) / self.sigma))

    def below(self, growth: float) -> tuple[float, float]:
        """Return both probabilities of growths up to this one."""
        x = self.sigma**2 * growth + 0.5
        return float(ndtr(x / self.sigma)), float(ndtr((x - 1) / self.sigma))

    def growth_passed(self, without: float, shifted: float) -> float:
        """Return a growth that is passed with at most these probabilities."""
        x = max(-self.sigma * float(ndtri(without)), 1 - self.sigma * float(ndtri(shifted)))
        return (x - 0.5) / self.sigma**2


class HiddenShift:
    """A random shift that nobody sees: the outputs are those of a mixture of Gaussians.

    Args:
        sigma: The noise's standard deviation σ.
        atoms: The law of the shift.
    """

    bounded = False

    def __init__(self, sigma: float, atoms: Atoms) -> None:
        self.sigma, self._atoms = sigma, atoms
        self._log_weight = np.log(atoms.weight) - np.square(atoms.size / sigma) / 2

    def growth_at(self, x: Array) -> Array:
        """Return the growth of outputs."""
        return self._growth(x, np.zeros(len(x)))[0]

    def position(self, growth: Array) -> Array:
        """Return the output at which the growth has this value; -inf at -inf.

        Raises:
            EngineError: If Newton's method does not settle.
        """
        x = np.full(growth.shape, -np.inf)
        finite = np.isfinite(growth)
        target = growth[finite]
        if len(target):
            x[finite] = self._solve(target)
        return x

    def _solve(self, target: Array) -> Array:
        """Solve growth(x) = target: convex and increasing, so Newton from the right never errs."""
        table = np.linspace(*self._enclose(target.min(), target.max()), _TABLE)
        height, slope = self._growth(table, np.zeros(_TABLE))
        right = np.minimum(np.searchsorted(height, target), _TABLE - 1)
        x = table[right] - (height[right] - target) / slope[right]
        for _ in range(_ROUNDS):
            miss, slope = self._growth(x, target)
            x -= miss / slope
            if np.abs(miss).max() <= _SETTLED:
                return x
        raise EngineError("the loss of a random shift could not be inverted")

    def _enclose(self, low: float, high: float) -> tuple[float, float]:
        """Return outputs between which the growth takes these values.

        The growth is at most the largest of its terms, and by Jensen's inequality at least the
        growth of the mean shift with the mean square.
        """
        size, variance = self._atoms.size, self.sigma**2
        total = self._atoms.weight.sum()
        mean = float(np.dot(self._atoms.weight, size) / total)
        square = float(np.dot(self._atoms.weight, np.square(size)) / total)
        left = float(np.min(low * variance / size + size / 2))
        right = ((high - math.log(total)) * variance + square / 2) / mean
        gap = 1e-9 * (1 + abs(left) + abs(right))
        return left - gap, right + gap

    def _growth(self, x: Array, target: Array) -> tuple[Array, Array]:
        """Return how far the growth at x exceeds the target, and its slope."""
        exponent = np.multiply.outer(x, self._atoms.size / self.sigma**2)
        exponent += self._log_weight
        peak = exponent.max(axis=1)
        exponent -= peak[:, None]
        ratio = np.exp(exponent, out=exponent)
        total = ratio.sum(axis=1)
        slope = ratio @ self._atoms.size / total / self.sigma**2
        return peak - target + np.log(total), slope

    def masses(self, growth: Array) -> Masses:
        """Return the probabilities between neighbouring growths."""
        x = self.position(growth)
        # Either side of the middle from its own tail, so that small masses keep their digits.
        mean = float(np.average(self._atoms.size, weights=self._atoms.weight))
        middle = min(max(int(np.searchsorted(x, mean)), 0), len(x) - 1)
        below = self._chance(x[: middle + 1], -1)
        above = self._chance(x[middle:], +1)
        return Masses(
            without=interval_probability(x / self.sigma),
            shifted=np.concatenate([np.diff(below), -np.diff(above)]),
            tail=(float(ndtr(-x[-1] / self.sigma)), float(above[-1]) + self._atoms.beyond),
        )

    def _chance(self, x: Array, side: int) -> Array:
        """Return the probability above (`side` +1) or below (-1) each output."""
        z = np.subtract.outer(x, self._atoms.size)
        z *= -side / self.sigma
        return ndtr(z, out=z) @ self._atoms.weight

    def log_below(self, growth: float) -> tuple[float, float]:
        """Return the logarithms of both probabilities of growths up to this one."""
        x = float(self.position(np.array([growth]))[0])
        z = (x - self._atoms.size) / self.sigma
        shifted: Any = logsumexp(log_ndtr(z), b=self._atoms.weight)
        return float(log_ndtr(x / self.sigma)), float(shifted)

    def below(self, growth: float) -> tuple[float, float]:
        """Return both probabilities of growths up to this one."""
        without, shifted = self.log_below(growth)
        return math.exp(without), math.exp(shifted)

    def growth_passed(self, without: float, shifted: float) -> float:
        """Return a growth that is passed with at most these probabilities."""
        x = -self.sigma * float(ndtri(without))
        step = self.sigma / 4
        while float(self._chance(np.array([x]), +1)[0]) > shifted:
            x += step
        return float(self._growth(np.array([x]), np.zeros(1))[0][0])


class RevealedShift:
    """A random shift that the adversary sees, with the output: the loss depends on both.

    The events are cells of the loss, whatever the shift, so that masses add up over its law.

    Args:
        sigma: The noise's standard deviation σ.
        atoms: The law of the shift.
    """

    bounded = False

    def __init__(self, sigma: float, atoms: Atoms) -> None:
        self.sigma, self._atoms = sigma, atoms

    def _position(self, growth: Array) -> Array:
        """Return the output at which the growth has this value, for each shift."""
        size = self._atoms.size
        with np.errstate(invalid="ignore"):
            return np.multiply.outer(growth, self.sigma**2 / size) + size / 2

    def masses(self, growth: Array) -> Masses:
        """Return the probabilities between neighbouring growths."""
        x, weight = self._position(growth), self._atoms.weight
        without = _interval_probabilities(x / self.sigma) @ weight
        if np.isneginf(growth[0]):
            # A shift beyond all others, seen but with the record not sampled: loss log(1 - q).
            without[0] += self._atoms.beyond
        shifted = _interval_probabilities((x - self._atoms.size) / self.sigma) @ weight
        last = x[-1] / self.sigma
        return Masses(
            without=without,
            shifted=shifted,
            tail=(
                float(ndtr(-last) @ weight),
                float(ndtr(self._atoms.size / self.sigma - last) @ weight) + self._atoms.beyond,
            ),
        )

    def log_below(self, growth: float) -> tuple[float, float]:
        """Return the logarithms of both probabilities of growths up to this one."""
        x, weight = self._position(np.array([growth]))[0], self._atoms.weight
        without: Any = logsumexp(log_ndtr(x / self.sigma), b=weight)
        shifted: Any = logsumexp(log_ndtr((x - self._atoms.size) / self.sigma), b=weight)
        return float(without), float(shifted)

    def below(self, growth: float) -> tuple[float, float]:
        """Return both probabilities of growths up to this one."""
        without, shifted = self.log_below(growth)
        return math.exp(without), math.exp(shifted)

    def growth_passed(self, without: float, shifted: float) -> float:
        """Return a growth that is passed with at most these probabilities."""
        size, weight = self._atoms.size, self._atoms.weight
        growth = 1.0
        while True:
            z = (growth * self.sigma**2 / size + size / 2) / self.sigma
            far = float(ndtr(-z) @ weight) <= without
            if far and float(ndtr(size / self.sigma - z) @ weight) <= shifted:
                return growth
            growth *= 1.25


def interval_probability(z: Array) -> Array:
    """Return the standard normal probability between neighbouring points, precise in both tails."""
    lower, upper = z[:-1], z[1:]
    return np.where(lower < 0, ndtr(upper) - ndtr(lower), ndtr(-lower) - ndtr(-upper))


def _interval_probabilities(z: Array) -> Array:
    """Return the same for each column of `z`, with half the work."""
    tail = ndtr(-np.abs(z))
    signed = np.where(z > 0, tail, -tail)
    crossing = (z[:-1] <= 0) & (z[1:] > 0)
    return signed[:-1] - signed[1:] + crossing
