"""Per-sample gradients that are formed, one sample at a time, rather than kept as factors.

Shape letters: B samples, R rows of a weight, N its columns, k probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veilspan.core.contributions import Dense, NormChoice, add_each
from veilspan.core.norms import sq_norm
from veilspan.core.projection import Projection
from veilspan.core.sums import ClippedSum


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Gradient that is formed anew, for one sample at a time, whenever it is asked for.

    The norm is taken of the numbers that are added: both come out of the same arithmetic on the
    same saved tensors, so no guard for the rounding of other arithmetic is needed.

    Args:
        size: Samples B.
        form: Returns the gradient of sample b in fp32 or fp64.
        projected: Returns the projection of sample b on probes `[N, k]`, as a batch of one, without
            forming the gradient, where there is such a way.
    """

    size: int
    form: Callable[[int], Tensor]
    projected: Callable[[int, Tensor], Projection] | None = None
    factored: ClassVar[bool] = False

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return the gradient of each sample, `[B, *parameter]`."""
        first = self.form(0)
        grad_Bx = first.new_empty((self.size, *first.shape)) if out is None else out
        grad_Bx[0] = first
        del first  # one gradient less at the peak
        for b in range(1, self.size):
            grad_Bx[b] = self.form(b)
        return grad_Bx

    def sample(self, b: int) -> Dense:
        """Return the gradient of sample `b`."""
        return Dense(gradient=self.form(b))

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norms; there is no factored form for `choose` to choose."""
        return torch.stack([sq_norm(self.form(b)) for b in range(self.size)])

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return whether a projection spares forming the gradient."""
        return self.projected is not None

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return the projections, sample by sample."""
        if self.projected is None:
            return _project_each(self, probes_BNk)
        found = [self.projected(b, probes_BNk[b]) for b in range(self.size)]
        return Projection(
            values_BRk=torch.cat([projection.values_BRk for projection in found]),
            size_B=torch.cat([projection.size_B for projection in found]),
            terms=max((projection.terms for projection in found), default=0),
        )

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b."""
        add_each(self, sums, name, factor_B)


@dataclass(frozen=True, kw_only=True)
class Formed:
    """Gradient that autograd has formed for each sample; kept as it is.

    Args:
        gradients: One for each sample, in the parameter's dtype.
    """

    gradients: tuple[Tensor, ...]
    factored: ClassVar[bool] = False

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return the gradients, `[B, *parameter]`."""
        return torch.stack(self.gradients, out=out)

    def sample(self, b: int) -> Dense:
        """Return the gradient of sample `b`."""
        return Dense(gradient=self.gradients[b])

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norms; there is no factored form for `choose` to choose."""
        return torch.stack([sq_norm(gradient) for gradient in self.gradients])

    @property
    def size(self) -> int:
        """Samples B."""
        return len(self.gradients)

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return False: the gradient is there."""
        return False

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return the gradients times probes."""
        return _project_each(self, probes_BNk)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b."""
        add_each(self, sums, name, factor_B)


def _project_each(part: Recomputed | Formed, probes_BNk: Tensor) -> Projection:
    """Form the gradient of one sample after the other, and project it."""
    values, sizes = [], []
    for probes_Nk, b in zip(probes_BNk, range(part.size), strict=True):
        gradient = part.sample(b).gradient
        values.append(gradient.reshape(len(gradient), -1).to(probes_Nk.dtype) @ probes_Nk)
        sizes.append(sq_norm(gradient).sqrt())
    return Projection(
        values_BRk=torch.stack(values), size_B=torch.stack(sizes), terms=probes_BNk.shape[1]
    )
