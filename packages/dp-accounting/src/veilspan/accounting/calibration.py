"""The smallest noise multiplier whose certified ε stays within a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from scipy.optimize import brentq

from veilspan.accounting.bounds import round_up
from veilspan.accounting.engines import CertifiedEngine, Engine, PldEngine
from veilspan.accounting.mechanism import SampledGaussian, check_delta, check_number

_SMALLEST, _LARGEST = 0.02, 1e6
_PRECISION = 1e-4  # relative step of the noise multiplier in which the root is refined


@dataclass(frozen=True, kw_only=True)
class NoiseBracket:
    """A noise multiplier that keeps the target and one just below it that does not.

    Args:
        noise_multiplier: Certified: its upper bound on ε is at most the target.
        too_small: Its upper bound on ε is above the target.
        epsilon: Upper bound on ε at `noise_multiplier`.
    """

    noise_multiplier: float
    too_small: float
    epsilon: float


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    relation: str = "add_remove",
    engine: Engine | None = None,
) -> NoiseBracket:
    """Find the smallest noise multiplier that is certified to keep `target_epsilon`.

    Args:
        target_epsilon: The ε that must not be exceeded; above 0.
        delta: The δ at which ε is meant; in (0, 1).
        sampling_probability: Chance of each record to be in a step's sample; in [0, 1].
        steps: Number of releases.
        relation: Neighbouring relation, "add_remove" or "replace".
        engine: Who bounds ε; the certified engine unless given.

    Returns:
        A bracket whose ends are within 0.05 % of each other.

    Raises:
        ValueError: If an argument is out of range or no noise multiplier in [0.02, 10⁶] fits.

    Guarantee:
        The engine's upper bound on ε at the returned noise multiplier is at most `target_epsilon`.
    """
    unit = SampledGaussian(
        noise_multiplier=1.0,
        sampling_probability=sampling_probability,
        steps=steps,
        relation=relation,
    )
    return find_noise(unit, target_epsilon, delta, engine)


def find_noise(
    mechanism: SampledGaussian,
    target_epsilon: float,
    delta: float,
    engine: Engine | None = None,
) -> NoiseBracket:
    """Find the noise multiplier of a mechanism; arguments and guarantee as in `calibrate_noise`.

    Args:
        mechanism: What is released; its own noise multiplier does not matter.
        target_epsilon: The ε that must not be exceeded; above 0.
        delta: The δ at which ε is meant; in (0, 1).
        engine: Who bounds ε; the certified engine unless given.

    Raises:
        ValueError: If an argument is out of range or no noise multiplier in [0.02, 10⁶] fits.
    """
    _check_target(target_epsilon)
    check_delta(delta)
    if mechanism.sampling_probability == 0 or mechanism.steps == 0:
        return NoiseBracket(noise_multiplier=0.0, too_small=0.0, epsilon=0.0)
    if engine is None:
        engine = CertifiedEngine(pld=PldEngine(one_sided=True))

    @cache
    def epsilon(sigma: float) -> float:
        return engine.epsilon(replace(mechanism, noise_multiplier=sigma), delta).upper

    low, high = _enclose(epsilon, target_epsilon)
    return _narrow(epsilon, target_epsilon, low, high)


def _enclose(epsilon: Callable[[float], float], target: float) -> tuple[float, float]:
    """Return noise multipliers of which the first is too small and the second large enough."""
    high = 1.0
    while epsilon(high) > target:
        if high == _LARGEST:
            raise ValueError(
                f"target_epsilon={target} needs a noise multiplier above {_LARGEST:g}, which "
                f"leaves no signal; with that much the closest ε is {round_up(epsilon(high))}. "
                "Raise target_epsilon, or lower steps or sampling_probability."
            )
        high = min(2 * high, _LARGEST)
    low = high / 2
    while epsilon(low) <= target:
        low, high = low / 2, low
        if low < _SMALLEST:
            raise ValueError(
                f"target_epsilon={target} is kept even by a noise multiplier of {high:.3g}: delta "
                "is so large that it covers whatever is released, or the target protects nothing. "
                "Lower delta or target_epsilon, or set noise_multiplier yourself."
            )
    return low, high


def _narrow(
    epsilon: Callable[[float], float], target: float, low: float, high: float
) -> NoiseBracket:
    """Shrink the bracket by Brent's method, then make sure of both of its ends."""

    def sigma(share: float) -> float:
        return low * (high / low) ** share  # both ends exactly, where their signs are known

    def miss(share: float) -> float:
        # An ε of 0, which much noise can reach, or of infinity gets a finite logarithm.
        return math.log(min(max(epsilon(sigma(share)) / target, 1e-12), 1e12))

    share: Any = brentq(miss, 0.0, 1.0, xtol=_PRECISION)
    root = sigma(share)
    enough = root
    while epsilon(enough) > target:
        enough *= 1 + _PRECISION
    too_small = root
    while epsilon(too_small) <= target:
        enough = min(enough, too_small)
        too_small /= 1 + _PRECISION
    return NoiseBracket(noise_multiplier=enough, too_small=too_small, epsilon=epsilon(enough))


def _check_target(target_epsilon: float) -> None:
    check_number("target_epsilon", target_epsilon)
    if not 0 < target_epsilon < math.inf:
        raise ValueError(
            f"target_epsilon is {target_epsilon}; it must be above 0 and finite. No amount of "
            "noise reaches 0; for training without privacy set noise_multiplier=0 instead."
        )


def largest(fits: Callable[[int], bool], *, start: int) -> int:
    """Return the largest count that fits, by doubling and bisection.

    Args:
        fits: True up to some count and false from there on; true at 0.
        start: First guess.

    Returns:
        The count; 2^40 or more where every count fits.
    """
    low, high = 0, max(start, 1)
    while fits(high):
        low, high = high, 2 * high
        if high > 1 << 40:  # nothing is ever spent, as with sampling_probability = 0
            return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
