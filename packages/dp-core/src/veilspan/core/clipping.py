"""How the norm of a gradient becomes the factor that clips it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """Map per-sample norms to factors so that `factor · norm ≤ clip_norm` always holds."""

    def factors(self, norm_B: Tensor, clip_norm: float) -> Tensor:
        """Return the factor of each sample, `[B]`, same dtype as `norm_B`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Scale a gradient down to the threshold when it is longer: `min(1, C/n)`.

    Source: Abadi et al. (2016), https://arxiv.org/abs/1607.00133, Algorithm 1.

    Examples:
        >>> Clip().factors(torch.tensor([0.5, 4.0]), clip_norm=1.0)
        tensor([1.0000, 0.2500])
    """

    def factors(self, norm_B: Tensor, clip_norm: float) -> Tensor:
        """Return `min(1, clip_norm / norm)`; `norm_B` is `[B]`."""
        return (clip_norm / norm_B).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True)
class Automatic:
    """Normalise every gradient to about the threshold: `C/(n + gamma)` (AUTO-S; γ = 0 is AUTO-V).

    Source: Bu, Wang, Zha, Karypis (2023), https://arxiv.org/abs/2206.07136.

    Args:
        gamma: Stability constant added to the norm, in units of the norm; at least 0.

    Raises:
        ValueError: If `gamma` is negative or not finite.

    Examples:
        >>> Automatic(gamma=0.0).factors(torch.tensor([0.5, 4.0]), clip_norm=1.0)
        tensor([2.0000, 0.2500])
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma is {self.gamma}; it must be finite and at least 0.")

    def factors(self, norm_B: Tensor, clip_norm: float) -> Tensor:
        """Return `clip_norm / (norm + gamma)`, and 0 for a zero gradient; `norm_B` is `[B]`."""
        return torch.where(norm_B > 0, clip_norm / (norm_B + self.gamma), 0.0)
