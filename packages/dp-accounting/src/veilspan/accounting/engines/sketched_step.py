"""One release whose contributions were clipped by estimated norms."""

from __future__ import annotations

from functools import lru_cache

from veilspan.accounting.engines.norm_law import Bound, Scale, find_atoms
from veilspan.accounting.engines.one_step import LARGEST_LOSS, OneStep
from veilspan.accounting.engines.shifts import HiddenShift, RevealedShift
from veilspan.accounting.mechanism import SampledGaussian


@lru_cache(maxsize=32)
def sketched_step(one: SampledGaussian, bound: Bound, atoms: int, tail: float) -> OneStep:
    """Return a pair that dominates a release with estimated norms ("upper"), or one below it.

    Args:
        one: The release, with `norms`, `0 < q < 1` and `0 < σ < ∞`.
        bound: Whether sizes are rounded up or down.
        atoms: Number of sizes, about.
        tail: Probability that may count as an infinite loss.

    Guarantee:
        The pair grows with the size in the stochastic order, as both directions of its divergence
        do. Of a size that is hidden the output alone is compared, a mixture of Gaussians; one
        that is revealed is compared together with the output.
    """
    assert one.norms is not None
    q, sigma = one.sampling_probability, one.noise_multiplier
    # A shift s has losses of about s²/(2σ²).
    largest = 1 + sigma * (2 * LARGEST_LOSS) ** 0.5
    scale = Scale(sigma=sigma, largest=largest, tail=tail / q * min(1.0, (1 - q) / q))
    law = find_atoms(one.norms, bound, count=atoms, scale=scale)
    shift = RevealedShift if one.norms.probes_shared else HiddenShift
    return OneStep(one, shift(sigma, law))
