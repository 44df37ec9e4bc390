"""What one use of a layer adds to the gradient of one parameter, sample by sample.

Each kind answers the same questions about the same saved tensors: the gradient of all samples, of
one sample, their squared norms without forming them, and their weighted sum. Shape letters: B
samples, T tokens, I and O features, V rows of an embedding, D its width, R distinct rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from veilspan.core.norms import compute_dtype, rounding_guard, sq_norm, sq_norms
from veilspan.core.protocols import NormKernel
from veilspan.core.sums import ClippedSum

NormChoice = Callable[[int, int, int], str]
"""Norm method, `direct` or `gram`, of a linear map with (tokens, inputs, outputs)."""


class SampleGradient(Protocol):
    """Gradient of one sample, formed: the norm is taken of the very numbers that are added."""

    def sq_norm(self) -> Tensor:
        """Return its squared norm, fp64 scalar."""
        ...

    def add_to(self, sums: ClippedSum, name: str, factor: float) -> None:
        """Add `factor` times the gradient to the sum of parameter `name`."""
        ...


class Contribution(Protocol):
    """Per-sample gradient of one parameter, not yet formed."""

    factored: ClassVar[bool]
    """Whether one product forms the gradients of all samples, and none of them is mostly zeros."""

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return the gradient of each sample, `[B, *parameter]`; written to `out` if given."""
        ...

    def sample(self, b: int) -> SampleGradient:
        """Return the gradient of sample `b`, formed in fp32 or fp64."""
        ...

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm of each sample's gradient, `[B]` fp64."""
        ...

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b to the sum of parameter `name`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Gradient of one sample as a whole tensor."""

    gradient: Tensor

    def sq_norm(self) -> Tensor:
        """Return the squared norm, fp64 scalar."""
        return sq_norm(self.gradient)

    def add_to(self, sums: ClippedSum, name: str, factor: float) -> None:
        """Add `factor` times the gradient."""
        sums.add_(name, self.gradient, factor)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Gradient of one sample that is zero outside of some distinct rows."""

    rows_R: Tensor
    gradient_RD: Tensor

    def sq_norm(self) -> Tensor:
        """Return the squared norm, fp64 scalar."""
        return sq_norm(self.gradient_RD)

    def add_to(self, sums: ClippedSum, name: str, factor: float) -> None:
        """Add `factor` times the rows."""
        sums.add_rows_(name, self.rows_R, self.gradient_RD, factor)


@dataclass(frozen=True, kw_only=True)
class OuterProducts:
    """Gradient `Σ_t g_t a_tᵀ` of a weight `[O, I]`: linear layers."""

    act_BTI: Tensor
    grad_BTO: Tensor
    kernel: NormKernel
    factored: ClassVar[bool] = True

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`."""
        return self.kernel.per_sample_grad(self.act_BTI, self.grad_BTO, out=out)

    def sample(self, b: int) -> Dense:
        """Return GᵀA of one sample, accumulated in fp32 or fp64."""
        dtype = compute_dtype(self.grad_BTO.dtype)
        act, grad = self.act_BTI[b : b + 1].to(dtype), self.grad_BTO[b : b + 1].to(dtype)
        return Dense(gradient=self.kernel.per_sample_grad(act, grad)[0])

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return ‖GᵀA‖² per sample by the form that `choose` names for this shape."""
        _, length, inputs = self.act_BTI.shape
        gram = choose(length, inputs, self.grad_BTO.shape[2]) == "gram"
        form = self.kernel.sq_norm_gram if gram else self.kernel.sq_norm_direct
        return form(self.act_BTI, self.grad_BTO)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · G_bᵀA_b."""
        if sums.sample_by_sample:
            _add_each(self, sums, name, factor_B)
        else:
            clip_norm = sums.clip_norm(name)
            total = self.kernel.weighted_grad(
                self.act_BTI, self.grad_BTO, factor_B, clip_norm=clip_norm
            )
            sums.add_(name, total)


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Gradient `Σ_t r_t` of a vector `[n]`: biases and gains of norms."""

    rows_BTn: Tensor
    factored: ClassVar[bool] = True

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return the sum over tokens, `[B, n]`."""
        sums_Bn = self.rows_BTn.sum(1, dtype=compute_dtype(self.rows_BTn.dtype))
        return sums_Bn if out is None else out.copy_(sums_Bn)

    def sample(self, b: int) -> Dense:
        """Return the sum over the tokens of one sample."""
        dtype = compute_dtype(self.rows_BTn.dtype)
        return Dense(gradient=self.rows_BTn[b].sum(0, dtype=dtype))

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm of the sums; `choose` makes no difference to a vector."""
        return sq_norms(self.per_sample())

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · Σ_t r_bt from the very sums that the norm was taken of."""
        sums.add_samples_(name, self.per_sample(), factor_B)


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Gradient of an embedding table `[V, D]`: row `id_t` receives `g_t`."""

    ids_BT: Tensor
    grad_BTD: Tensor
    rows: int
    factored: ClassVar[bool] = False

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return one table per sample, `[B, V, D]`."""
        batch, _, width = self.grad_BTD.shape
        if out is None:
            table = self.grad_BTD.new_zeros((batch * self.rows, width))
        else:
            table = out.zero_().view(batch * self.rows, width)
        sample = torch.arange(batch, device=self.ids_BT.device)[:, None] * self.rows
        grad = self.grad_BTD.flatten(0, 1).to(table.dtype)
        table.index_add_(0, (self.ids_BT + sample).flatten(), grad)
        return table.view(batch, self.rows, width)

    def sample(self, b: int) -> Rows:
        """Return the sums over the distinct tokens of one sample; no `[V, D]` buffer."""
        grad_TD = self.grad_BTD[b].to(compute_dtype(self.grad_BTD.dtype))
        distinct, place_T = torch.unique(self.ids_BT[b], return_inverse=True)
        sums = grad_TD.new_zeros((len(distinct), grad_TD.shape[1]))
        return Rows(rows_R=distinct, gradient_RD=sums.index_add_(0, place_T, grad_TD))

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm over the distinct tokens of each sample."""
        dtype = compute_dtype(self.grad_BTD.dtype)
        guard = rounding_guard(self.ids_BT.shape[1], dtype)
        sq = []
        for b, grad_TD in enumerate(self.grad_BTD):
            size = torch.linalg.vector_norm(grad_TD, dim=1, dtype=dtype).double().sum()
            sq.append(self.sample(b).sq_norm() + (guard * size).square())
        return torch.stack(sq)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · table_b."""
        _add_each(self, sums, name, factor_B)


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Gradient that is formed anew, for one sample at a time, whenever it is asked for.

    The norm is taken of the numbers that are added: both come out of the same arithmetic on the
    same saved tensors, so no guard for the rounding of other arithmetic is needed.

    Args:
        size: Samples B.
        form: Returns the gradient of sample b in fp32 or fp64.
    """

    size: int
    form: Callable[[int], Tensor]
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

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b."""
        _add_each(self, sums, name, factor_B)


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

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · gradient_b."""
        _add_each(self, sums, name, factor_B)


def _add_each(part: Contribution, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
    """Add sample by sample; a zero factor drops its sample whatever it is."""
    for b, factor in enumerate(factor_B.tolist()):
        if factor != 0.0:
            part.sample(b).add_to(sums, name, factor)
