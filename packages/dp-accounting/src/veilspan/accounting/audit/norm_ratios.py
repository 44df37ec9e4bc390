"""Audit of clipping by estimated norms from the lengths of one gradient's contributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import smirnov

from veilspan.accounting.audit.checks import check_confidence
from veilspan.accounting.sketched import SketchedClip

Array = NDArray[np.float64]

_FEWEST = 30
_ROUNDING = 1e-6  # relative, of a measured ratio: a norm of exactly one threshold is not above it


@dataclass(frozen=True, kw_only=True)
class NormRatioAudit:
    """How often contributions were longer than their threshold, against how often they may be.

    Args:
        repetitions: Number n of measured ratios.
        confidence: One minus the chance of a false alarm.
        claim: The law that the ratios are said to keep.
        ratio: Where the measurement exceeds the claim most, in thresholds; at least 1.
        measured: Share of the ratios that reach it.
        allowed: Chance, at most, of that by the claim.
        p_value: Chance, at most, of so large an excess anywhere if the claim is true.

    Guarantee:
        If the ratios are independent and P(ratio > s) is at most `claim.exceeds(s)` for all s >= 1,
        `verdict` is "contradicted" with probability at most 1 - `confidence`. "consistent" proves
        nothing: it is the absence of a contradiction.
    """

    repetitions: int
    confidence: float
    claim: SketchedClip
    ratio: float
    measured: float
    allowed: float
    p_value: float

    @property
    def excess(self) -> float:
        """Return D⁺, the largest amount by which a measured share exceeds its allowed chance."""
        return max(self.measured - self.allowed, 0.0)

    @property
    def contradictions(self) -> tuple[str, ...]:
        """Say what cannot be true if the claim is."""
        if self.p_value > 1 - self.confidence:
            return ()
        return (
            f"{self.measured:.4g} of {self.repetitions} contributions reach {self.ratio:.4g} clip "
            f"norms, where the chance is at most {self.allowed:.4g} (p-value {self.p_value:.2g})",
        )

    @property
    def verdict(self) -> Literal["consistent", "contradicted"]:
        """Return "contradicted" where the ratios cannot keep the claim."""
        return "contradicted" if self.contradictions else "consistent"


def audit_norm_ratios(
    ratios: Sequence[float] | Array, *, claim: SketchedClip, confidence: float = 0.95
) -> NormRatioAudit:
    """Test measured contributions of one gradient against the law of clipping by estimated norms.

    Let one record have a gradient that is far longer than `clip_norm`, as an outer product of two
    vectors: no other makes longer contributions. Clip it many times with fresh probes, and pass
    ‖contribution‖ / clip_norm of each. A shorter gradient, or one of higher rank, cannot cause a
    false alarm, but hides faults.

    This sees the bulk of the law: with 2000 repetitions and a confidence of 0.95, a chance that is
    0.027 too large. The far tail, on which ε depends at a small δ, is proved and not measured.

    Args:
        ratios: Contribution over threshold, at least 30, of independent repetitions. Records that
            share their probes are one repetition together, not several.
        claim: What the clipper reports about itself, with groups = 1. Groups that are clipped apart
            are audited apart, each by the ratios to its own threshold.
        confidence: One minus the chance of a false alarm; above 1/2 and below 1.

    Returns:
        Where the measurement exceeds the claim most, and the verdict.

    Raises:
        ValueError: If ratios are too few, negative or not finite, `claim` is not a `SketchedClip`
            of one group, or `confidence` is out of range.

    Guarantee:
        A one-sided Kolmogorov-Smirnov test of D⁺ = sup over s >= 1 of (share of ratios above s) -
        claim.exceeds(s). Where the claim is only an upper bound, D⁺ is smaller than it would be for
        the law itself, so the p-value errs upward. It is exact for a continuous law equal to the
        claim, and never above exp(-2 n D⁺²) where that is below 1/2 (Massart). Ratios count as
        1e-6 of themselves shorter than measured, for rounding.

    Source: Birnbaum, Tingey (1951), https://doi.org/10.1214/aoms/1177729550, for the exact law;
    Massart (1990), https://doi.org/10.1214/aop/1176990746, for the bound. The claim is proved in
    the documentation, "Randomized clipping".

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> claim = SketchedClip(probes=8)
        >>> audit_norm_ratios((rng.chisquare(8, 2000) / 8) ** -0.5, claim=claim).verdict
        'consistent'
        >>> audit_norm_ratios((rng.chisquare(4, 2000) / 4) ** -0.5, claim=claim).verdict
        'contradicted'
    """
    check_confidence(confidence)
    _check_claim(claim)
    found = np.sort(_check_ratios(ratios)) / (1 + _ROUNDING)
    count = len(found)
    above = found[found > 1]
    # The share above s falls at the ratios: it exceeds the claim most at 1, or just before one.
    places = np.append(1.0, above)
    reached = np.append(len(above), count - np.searchsorted(found, above, side="left")) / count
    allowed = claim.exceeds(places)
    worst = int(np.argmax(reached - allowed))
    excess = max(float(reached[worst] - allowed[worst]), 0.0)
    return NormRatioAudit(
        repetitions=count,
        confidence=confidence,
        claim=claim,
        ratio=float(places[worst]),
        measured=float(reached[worst]),
        allowed=float(allowed[worst]),
        p_value=float(smirnov(count, excess)),
    )


def _check_claim(claim: object) -> None:
    if not isinstance(claim, SketchedClip):
        raise ValueError(
            f"claim is {claim!r}; it must be a SketchedClip, as the clipper reports it."
        )
    if claim.groups != 1:
        raise ValueError(
            f"claim has groups = {claim.groups}; it must have 1. Audit each group by itself, with "
            "groups=1 and the ratios of its contributions to its own threshold."
        )


def _check_ratios(values: Sequence[float] | Array) -> Array:
    ratios = np.asarray(values)
    if ratios.ndim != 1 or ratios.dtype.kind not in "iuf" or len(ratios) < _FEWEST:
        raise ValueError(
            f"ratios has shape {ratios.shape} and dtype {ratios.dtype}; it must be one row of at "
            f"least {_FEWEST} numbers, one per repetition."
        )
    bad = ~np.isfinite(ratios) | (ratios < 0)
    if bad.any():
        raise ValueError(
            f"ratios holds {np.count_nonzero(bad)} numbers that are negative or not finite. A norm "
            "is neither: what makes such contributions is broken."
        )
    return ratios.astype(np.float64)
