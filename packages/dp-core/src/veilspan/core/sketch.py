"""Norms estimated from a few Gaussian probes: what a user asks for, and the law to account for.

An estimate of ‖G‖² is the mean of ‖G z‖² over probes z. No gradient is formed, and nothing grows
with the square of the length or with the product of the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from veilspan.core.errors import UnsupportedModelError
from veilspan.core.groups import Clipping, Groups
from veilspan.core.protocols import NoiseSource
from veilspan.core.streams import check_count


@final
@dataclass(frozen=True, kw_only=True)
class NormLaw:
    """How estimated norms were drawn: what an accountant needs to know of them.

    With X the largest of `blocks` independent means of `probes / blocks` squared standard normals,
    the contribution of a record to one group exceeds s ≥ 1 thresholds with probability at most
    P(X ≤ s⁻²). `veilspan.accounting.SketchedClip` has the same fields.

    Args:
        probes: Gaussian probes of each estimate.
        blocks: Independent block means, of which the largest is the estimate.
        probes_shared: Whether records share probes, so that ratios count as revealed.
        groups: Groups with independent estimates and equal thresholds.
    """

    probes: int
    blocks: int
    probes_shared: bool
    groups: int


@final
@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Estimate the norms of large weights from Gaussian probes; small ones stay exact.

    Every record has probes of its own, fresh in every micro-batch and secret, so accountants may
    count the ratio of norm to threshold as hidden. The largest of a few block means is used: an
    underestimate, which is what costs privacy, then needs all of them to be low at once.

    Args:
        probes: Probes k of each estimate: more of them cost time, fewer cost noise.
        blocks: Block means; divides `probes`.
        basis: Directions of each linear map that are found first, from probes of their own, and
            measured exactly; the probes then estimate the rest (Hutch++). That makes estimates
            steadier where few directions hold most of a gradient, and takes three more products
            each. What is proved of it needs the same noise as without. Weights that are used
            several times, fused heads, and ranks that share sequences do without.
        stream: Source of the probes, with a secret key; one may serve several steps or processes,
            as each draws under a fresh name. By default a cryptographic one with a fresh key from
            the operating system.

    Raises:
        ValueError: If a number is not as above.

    Guarantee:
        The contribution of a record to a group's sum exceeds s ≥ 1 thresholds with probability at
        most what `NormLaw` says, whatever its gradient: the sensitivity is random, and the noise
        must be calibrated for it. Proof: "Randomized clipping" in the documentation.

    Source:
        Hutchinson (1990), https://doi.org/10.1080/03610919008812866; Hutch++: Meyer, Musco, Musco,
        Woodruff (2021), https://arxiv.org/abs/2010.09649.

    Examples:
        >>> Sketch(probes=64, blocks=4)
        Sketch(probes=64, blocks=4, basis=0)
    """

    probes: int = 64
    blocks: int = 4
    basis: int = 0
    stream: NoiseSource | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_count("probes", self.probes, least=1)
        check_count("blocks", self.blocks, least=1)
        check_count("basis", self.basis, least=0)
        if self.probes % self.blocks:
            raise ValueError(
                f"blocks is {self.blocks} and probes is {self.probes}; blocks must divide probes, "
                "as 4 divides 64."
            )

    @property
    def products(self) -> int:
        """Vectors that a gradient is multiplied by, from either side."""
        return self.probes + 3 * self.basis

    def projects(self, parameter: Tensor) -> bool:
        """Return whether a parameter has more rows and more columns than there are products."""
        rows = len(parameter) if parameter.ndim > 1 else 0
        return rows > self.products and parameter.numel() // rows > self.products

    def law(self, clipping: Clipping, groups: Groups) -> NormLaw:
        """Return the law of a model's ratios.

        Raises:
            UnsupportedModelError: If thresholds move, or those of several groups are not equal.
        """
        if clipping.adaptive is not None:
            raise UnsupportedModelError(
                "norms=Sketch(...) is given with adaptive=, whose counts depend on the estimates; "
                "no law is proved for releasing both. Use fixed thresholds, or exact norms."
            )
        if len(set(groups.clip_norms)) > 1:
            raise UnsupportedModelError(
                f"norms=Sketch(...) with {len(groups)} clipping groups needs equal thresholds: no "
                "other law is counted. Use budgets='equal', Flat(...), or exact norms."
            )
        return NormLaw(
            probes=self.probes, blocks=self.blocks, probes_shared=False, groups=len(groups)
        )
