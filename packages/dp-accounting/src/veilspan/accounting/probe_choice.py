"""How many probes to estimate norms from: noise against time, for a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaincinv

from veilspan.accounting.calibration import find_noise
from veilspan.accounting.mechanism import check_number
from veilspan.accounting.plan import PrivacyPlan
from veilspan.accounting.sketched import SketchedClip

_PROBES = (8, 16, 32, 64, 128)
_SMALLEST_BLOCK = 4
_NODES = 200


@dataclass(frozen=True, kw_only=True)
class ProbeChoice:
    """One way to know norms, and what it costs.

    Args:
        norms: The law of the estimates; `None` for exact norms.
        noise_multiplier: What keeps the plan's ε.
        noise: That against the noise multiplier with exact norms.
        bias: How much smaller typical gradients become, as the largest block mean tends to exceed
            their norm.
        time: Time of a step against one without norms.
    """

    norms: SketchedClip | None
    noise_multiplier: float
    noise: float
    bias: float
    time: float

    def cost(self, noise_worth: float = 1.0) -> float:
        """Return the time of a step times its noise against its signal.

        Args:
            noise_worth: Power of the noise: 1 takes one percent of noise for as bad as one percent
                of time, as a batch that is larger by so much would make up for it.
        """
        return self.time * (self.noise * self.bias) ** noise_worth


def probe_table(
    plan: PrivacyPlan,
    *,
    exact_share: float,
    share_per_probe: float,
    effective_rank: float = 300.0,
    probes_shared: bool = False,
) -> tuple[ProbeChoice, ...]:
    """Return the choices of which none is both faster and less noisy, fastest first.

    Tried are exact norms and 8 to 128 probes in blocks of 4 or more. This takes some seconds. The
    best for an exchange rate is `min(table, key=ProbeChoice.cost)`.

    Args:
        plan: What the choice is for; its own `norms` do not matter, and its ε with exact norms is
            kept.
        exact_share: Time that exact norms take, over the time of a step without norms; measured.
        share_per_probe: The same for each probe; measured.
        effective_rank: (Σλ)²/Σλ² of the squared singular values of typical per-record gradients,
            over all layers together. Only `bias` depends on it, never ε.
        probes_shared: Whether the records of a step share their probes.

    Raises:
        ValueError: If a number is out of range, or the plan's settings are not counted with
            estimated norms.

    Guarantee:
        Each noise multiplier is certified to keep the ε of the plan with exact norms.
    """
    for name, value in (("exact_share", exact_share), ("share_per_probe", share_per_probe)):
        if not 0 <= check_number(name, value) < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be at least 0 and finite.")
    if not 1 <= check_number("effective_rank", effective_rank) < math.inf:
        raise ValueError(f"effective_rank is {effective_rank!r}; it must be at least 1 and finite.")
    plan = replace(plan, norms=None)
    if plan.noise_multiplier == 0:
        raise ValueError("noise_multiplier is 0, so there is no ε to keep; give a plan with noise.")
    target = plan.epsilon().upper
    exact = _noise(plan, target)
    choices = [
        ProbeChoice(norms=None, noise_multiplier=exact, noise=1.0, bias=1.0, time=1 + exact_share)
    ]
    for norms in _candidates(probes_shared):
        if share_per_probe * norms.probes >= exact_share:
            continue  # exact norms are as fast, and less noisy
        noise = _noise(replace(plan, norms=norms), target)
        choices.append(
            ProbeChoice(
                norms=norms,
                noise_multiplier=noise,
                noise=noise / exact,
                bias=norm_bias(norms, effective_rank),
                time=1 + share_per_probe * norms.probes,
            )
        )
    return _efficient(choices)


def norm_bias(norms: SketchedClip, effective_rank: float) -> float:
    """Return 1 / E[N^-½] for a gradient of a flat spectrum, N being its estimate over its norm².

    Args:
        norms: The law of the estimates.
        effective_rank: Number of equal singular values; need not be whole.
    """
    half = effective_rank * norms.probes / norms.blocks / 2
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    largest = gammaincinv(half, ((nodes + 1) / 2) ** (1 / norms.blocks)) / half
    return 1 / float(np.dot(weights / 2, largest**-0.5))


def _candidates(probes_shared: bool) -> list[SketchedClip]:
    return [
        SketchedClip(probes=probes, blocks=1 << power, probes_shared=probes_shared)
        for probes in _PROBES
        for power in range(8)
        if probes >> power >= _SMALLEST_BLOCK
    ]


def _noise(plan: PrivacyPlan, target: float) -> float:
    return find_noise(plan.mechanism(plan.steps), target, plan.delta).noise_multiplier


def _efficient(choices: list[ProbeChoice]) -> tuple[ProbeChoice, ...]:
    kept: list[ProbeChoice] = []
    for choice in sorted(choices, key=lambda one: (one.time, one.noise * one.bias)):
        if not kept or choice.noise * choice.bias < kept[-1].noise * kept[-1].bias:
            kept.append(choice)
    return tuple(kept)
