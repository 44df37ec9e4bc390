"""The Gaussian mechanism: what is announced of a logical batch, then released."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from veilspan.core.adaptive import PrivateQuantile
from veilspan.core.errors import PrivacyError
from veilspan.core.groups import Groups
from veilspan.core.protocols import NoiseSource
from veilspan.core.sketch import NormLaw

# They have a dash: no parameter is called so.
_COUNTS, _SIGN = "veilspan.counts-within-thresholds", "veilspan.sign-of-one-key"

_last_drawn: WeakKeyDictionary[object, int] = WeakKeyDictionary()  # step, by source of noise


@dataclass(frozen=True, kw_only=True)
class Release:
    """What one logical batch is about to release, announced before its noise exists.

    Args:
        step: Index of the logical batch.
        noise_multiplier: σ of the release as one Gaussian mechanism: what an accountant composes.
        sensitivity: L2 sensitivity of the clipped sum.
        expected_batch_size: Public constant that divides the noisy sum.
        gradient_noise_multiplier: Standard deviation of the gradients' noise over `sensitivity`;
            larger than σ where the counts of a private quantile are part of the release.
        count_stddev: Standard deviation of the noise on each count of a private quantile; None
            where thresholds are fixed.
        norms: How norms were estimated; None where they are exact. Where they are estimated,
            `sensitivity` is exceeded as far and as often as this law allows.
    """

    step: int
    noise_multiplier: float
    sensitivity: float
    expected_batch_size: float
    gradient_noise_multiplier: float
    count_stddev: float | None = None
    norms: NormLaw | None = None


def with_thresholds(groups: Groups, thresholds: Mapping[str, float]) -> Groups:
    """Return the same groups with the thresholds of an earlier step, by name.

    Raises:
        PrivacyError: If the names are not those of the groups.
    """
    if set(thresholds) != set(groups.names):
        raise PrivacyError(
            f"The state does not fit: it holds thresholds of the groups {sorted(thresholds)}, this "
            f"step has {sorted(groups.names)}. Build PrivateStep with the clipping of the run that "
            "saved it."
        )
    return replace(groups, clip_norms=tuple(float(thresholds[name]) for name in groups.names))


class GaussianMechanism:
    """Noise, scale, and the thresholds of the next logical batch.

    Args:
        noise: Noise source.
        noise_multiplier: σ of the release as one mechanism.
        expected_batch_size: Public constant that divides the noisy sum.
        adaptive: Private quantile that moves the thresholds, if any.
        norms: How norms are estimated, if they are.

    Guarantee:
        Within a process, a source of noise is asked once for each step, also where several
        mechanisms have it: the difference of two releases under one noise has none.
    """

    def __init__(
        self,
        noise: NoiseSource,
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        adaptive: PrivateQuantile | None,
        norms: NormLaw | None,
    ) -> None:
        self._noise = noise
        self._sigma = noise_multiplier
        self._expected = expected_batch_size
        self._adaptive = adaptive
        self._norms = norms
        self._process = os.getpid()

    def announce(self, step: int, groups: Groups) -> Release:
        """Return what step `step` will release under the thresholds of `groups`.

        Raises:
            PrivacyError: If its noise was drawn before.
        """
        self._require_new_noise(step)
        adaptive, sigma = self._adaptive, self._sigma
        gradients = adaptive.gradient_noise_multiplier(sigma) if adaptive else sigma
        return Release(
            step=step,
            noise_multiplier=sigma,
            sensitivity=groups.sensitivity,
            expected_batch_size=self._expected,
            gradient_noise_multiplier=gradients,
            count_stddev=adaptive.count_stddev(sigma, len(groups)) if adaptive else None,
            norms=self._norms,
        )

    def sign(self, release: Release, device: torch.device) -> Tensor:
        """Return a few secret numbers that sources with one key have in common, `[4]` fp64."""
        numbers = torch.zeros(4, dtype=torch.float64, device=device)
        if release.gradient_noise_multiplier:
            self._noise.add_(numbers, stddev=1.0, step=release.step, name=_SIGN, offset=0)
        return numbers

    def noisy_mean(self, release: Release, name: str, total: Tensor, *, offset: int) -> Tensor:
        """Return (total + noise) / expected_batch_size, in place.

        Args:
            release: What was announced.
            name: Name of the parameter, which addresses its noise.
            total: The part of the clipped sum held here, fp32 or fp64.
            offset: Flat index of that part in the whole parameter.
        """
        if release.gradient_noise_multiplier:  # without noise the sensitivity may be infinite
            _last_drawn[self._source] = release.step
            stddev = release.gradient_noise_multiplier * release.sensitivity
            self._noise.add_(total, stddev=stddev, step=release.step, name=name, offset=offset)
        return total.div_(self._expected)

    def next_groups(self, release: Release, groups: Groups, within_M: Tensor) -> Groups:
        """Return the groups with the thresholds of the next logical batch.

        Args:
            release: What was announced.
            groups: The groups of this batch.
            within_M: Σ_b (1[norm ≤ C_m] - 1/2), fp64, `[M]`; noise is added in place.
        """
        if self._adaptive is None or release.count_stddev is None:
            return groups
        stddev = release.count_stddev
        if stddev:
            self._noise.add_(within_M, stddev=stddev, step=release.step, name=_COUNTS, offset=0)
        moved = self._adaptive.moved(groups.clip_norms, within_M, self._expected)
        return replace(groups, clip_norms=moved)

    @property
    def _source(self) -> object:
        """What stands for the noise in the list of those drawn."""
        try:
            _ = ref(self._noise), hash(self._noise)
        except TypeError:
            return self
        return self._noise

    def _require_new_noise(self, step: int) -> None:
        if not self._sigma:
            return
        if os.getpid() != self._process:
            raise PrivacyError(
                "This PrivateStep was built in another process, which would draw the same noise "
                "(fork). Build it in the process that trains."
            )
        last = _last_drawn.get(self._source, -1)
        if step <= last:
            raise PrivacyError(
                f"Step {step} would have noise that was drawn before: this noise has served step "
                f"{last}, and the difference of two releases under one noise has none. Give every "
                "PrivateStep a noise of its own; to go back to an earlier state, keep next_step as "
                "it was, or build the step again with noise=GaussianNoise(new_key())."
            )
