"""Clipping by estimated norms: the law of how far a contribution may exceed its threshold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammainc


@dataclass(frozen=True, kw_only=True)
class SketchedClip:
    """Norms estimated from Gaussian probes, as a clipper reports that it estimated them.

    The estimate of ‖g‖² is ‖g‖² X, so a clipped contribution has norm at most S = C max(1, X^-½).
    For every gradient S is stochastically dominated by the same with X = max over `blocks` of
    χ²_m / m, where m = probes / blocks.

    Args:
        probes: Gaussian probes k of each estimate; at least 1.
        blocks: The estimate is the largest of this many independent block means; divides `probes`.
        probes_shared: Whether the records of a step share their probes, so that S counts as
            revealed; otherwise every record has probes of its own, and S stays hidden.
        groups: Groups M that are clipped apart, by independent estimates, with equal thresholds
            C/√M.

    Raises:
        ValueError: If a number is not as above.

    Source:
        Estimates: Hutchinson (1990), https://doi.org/10.1080/03610919008812866. The law is proved
        in the documentation, "Randomized clipping".
    """

    probes: int
    blocks: int = 1
    probes_shared: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("probes", "blocks", "groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.probes % self.blocks:
            raise ValueError(
                f"blocks is {self.blocks} and probes is {self.probes}; blocks must divide probes, "
                "as 4 divides 64."
            )
        if not isinstance(self.probes_shared, bool):
            raise ValueError(f"probes_shared is {self.probes_shared!r}; it must be True or False.")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the law whose fields these are.

        Raises:
            ValueError: If fields are unknown, missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            raise ValueError(
                f"norms has fields {sorted(data)}; they must be {sorted(known)}, all of them."
            )
        return cls(**data)

    def exceeds(self, ratio: ArrayLike) -> NDArray[np.float64]:
        """Return the chance, at most, that one group's contribution exceeds `ratio` thresholds.

        Args:
            ratio: Contribution over threshold, any shape. Below 1 the chance is only bounded by 1.
        """
        s = np.asarray(ratio, dtype=np.float64)
        half = self.probes / self.blocks / 2
        with np.errstate(divide="ignore"):
            below = gammainc(half, half / np.square(s))
        return np.where(s < 1, 1.0, below**self.blocks)
