"""What one use of a layer adds to the gradient of one parameter, sample by sample.

Each kind answers the same questions about the same saved tensors: the gradient of all samples, of
one sample, their squared norms without forming them, their product with a few vectors, and their
weighted sum. Shape letters: B samples, T tokens, I and O features, V rows of an embedding, D its
width, R distinct rows, or the rows of a weight, N its columns, k probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from veilspan.core.norms import distinct_sums, magnitudes, sq_norm, sq_norms
from veilspan.core.products import compute_dtype, products
from veilspan.core.projection import ProbeRows, Projection, rows_at_once
from veilspan.core.protocols import NormKernel
from veilspan.core.sums import ClippedSum

NormChoice = Callable[[int, int, int], str]
"""Norm method, `direct` or `gram`, of a linear map with (tokens, inputs, outputs)."""


class SampleGradient(Protocol):
    """Gradient of one sample, formed: the norm is taken of the very numbers that are added."""

    def sq_norm(self) -> Tensor:
        """Return its squared norm, fp64 scalar."""
        ...

    def add_to(self, sums: ClippedSum, name: str, factor: Tensor) -> None:
        """Add `factor`, a scalar, times the gradient to the sum of parameter `name`."""
        ...

    def write(self, out: Tensor) -> None:
        """Write the gradient into zeros of the parameter's shape."""
        ...


class Contribution(Protocol):
    """Per-sample gradient of one parameter, not yet formed."""

    factored: ClassVar[bool]
    """Whether one product forms the gradients of all samples, and none of them is mostly zeros."""

    @property
    def size(self) -> int:
        """Samples B."""
        ...

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return the gradient of each sample, `[B, *parameter]`; written to `out` if given."""
        ...

    def sample(self, b: int) -> SampleGradient:
        """Return the gradient of sample `b`, formed in fp32 or fp64."""
        ...

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm of each sample's gradient, `[B]` fp64."""
        ...

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return whether `project` is cheaper than `sq_norms`.

        Args:
            pays: Answers for a linear map with (tokens, inputs, outputs).
        """
        ...

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return the gradient of each sample, as a matrix, times the sample's own probes."""
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

    def add_to(self, sums: ClippedSum, name: str, factor: Tensor) -> None:
        """Add `factor` times the gradient."""
        sums.add_(name, self.gradient, factor)

    def write(self, out: Tensor) -> None:
        """Write the gradient."""
        out.copy_(self.gradient)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Gradient of one sample that is zero outside of some rows, as `distinct_sums` gives it."""

    rows_R: Tensor
    gradient_RD: Tensor

    def sq_norm(self) -> Tensor:
        """Return the squared norm, fp64 scalar."""
        return sq_norm(self.gradient_RD)

    def add_to(self, sums: ClippedSum, name: str, factor: Tensor) -> None:
        """Add `factor` times the rows."""
        sums.add_rows_(name, self.rows_R, self.gradient_RD, factor)

    def write(self, out: Tensor) -> None:
        """Write the rows."""
        out.index_add_(0, self.rows_R, self.gradient_RD.to(out.dtype))


@dataclass(kw_only=True)
class OuterProducts:
    """Gradient `Σ_t g_t a_tᵀ` of a weight `[O, I]`: linear layers."""

    act_BTI: Tensor
    grad_BTO: Tensor
    kernel: NormKernel
    _size_B: Tensor | None = field(init=False, default=None)  # Σ_t ‖a_t‖‖g_t‖, once known
    factored: ClassVar[bool] = True

    def per_sample(self, out: Tensor | None = None) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`."""
        return self.kernel.per_sample_grad(self.act_BTI, self.grad_BTO, out=out)

    def sample(self, b: int) -> Dense:
        """Return GᵀA of one sample, accumulated in fp32 or fp64."""
        dtype = compute_dtype(self.grad_BTO.dtype)
        grad, act = self.grad_BTO[b : b + 1], self.act_BTI[b : b + 1]
        return Dense(gradient=products(grad.mT, act, dtype)[0])

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return ‖GᵀA‖² per sample by the form that `choose` names for this shape."""
        _, length, inputs = self.act_BTI.shape
        gram = choose(length, inputs, self.grad_BTO.shape[2]) == "gram"
        form = self.kernel.sq_norm_gram if gram else self.kernel.sq_norm_direct
        sq_norm_B, self._size_B = form(self.act_BTI, self.grad_BTO)
        return sq_norm_B

    @property
    def size(self) -> int:
        """Samples B."""
        return len(self.act_BTI)

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return what `pays` says of this shape."""
        _, length, inputs = self.act_BTI.shape
        return pays(length, inputs, self.grad_BTO.shape[2])

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return Gᵀ(A Z): two thin products."""
        size, _, count = probes_BNk.shape
        values_BRk = probes_BNk.new_empty((size, self.grad_BTO.shape[2], count))
        first = 0
        for rows_Brk in self.project_rows(count, lambda first, last, _: probes_BNk[:, first:last]):
            values_BRk[:, first : (first := first + rows_Brk.shape[1])] = rows_Brk
        sizes = magnitudes(self.act_BTI, self.grad_BTO)
        return Projection(values_BRk=values_BRk, size_B=sizes, terms=self.terms)

    @property
    def terms(self) -> int:
        """Length of the sums behind each number of a projection."""
        return self.act_BTI.shape[1] + self.act_BTI.shape[2]

    def project_rows(self, count: int, probes: ProbeRows) -> Iterator[Tensor]:
        """Yield Gᵀ(A Z) a few rows at a time, `[B, r, k]`, which last until the next are asked for.

        Beside them there is A Z, `[B, T, k]`, and nothing that grows with the weight.

        Args:
            count: Probes k of each sample.
            probes: Returns a few elements of each.
        """
        size, length, inputs = self.act_BTI.shape
        dtype = compute_dtype(self.grad_BTO.dtype)
        step = rows_at_once(count, self.act_BTI.device)
        thin_BTk = self.act_BTI.new_zeros((size, length, count), dtype=dtype)
        room = thin_BTk.new_empty(size * step * count)
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            probes_Bnk = probes(first, last, room[: size * (last - first) * count]).to(dtype)
            thin_BTk.baddbmm_(self.act_BTI[:, :, first:last].to(dtype), probes_Bnk)
        for grad_BTr in self.grad_BTO.split(step, dim=2):
            rows = grad_BTr.shape[2]
            rows_Brk = room[: size * rows * count].view(size, rows, count)
            yield torch.bmm(grad_BTr.to(dtype).mT, thin_BTk, out=rows_Brk)

    def transposed(self) -> OuterProducts:
        """Return the transposes of the gradients."""
        return replace(self, act_BTI=self.grad_BTO, grad_BTO=self.act_BTI)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · G_bᵀA_b."""
        if sums.sample_by_sample:
            add_each(self, sums, name, factor_B)
        else:
            sums.add_outer_products_(name, self.act_BTI, self.grad_BTO, factor_B, self._size_B)


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

    @property
    def size(self) -> int:
        """Samples B."""
        return len(self.rows_BTn)

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return False: a vector is its own projection."""
        return False

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return the sums as a matrix of one column, times probes `[B, 1, k]`."""
        sums_Bn = self.per_sample().to(probes_BNk.dtype)
        size_B = sq_norms(sums_Bn).sqrt()
        return Projection(values_BRk=sums_Bn[:, :, None] @ probes_BNk, size_B=size_B, terms=1)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · Σ_t r_bt from the very sums that the norm was taken of."""
        sums.add_samples_(name, self.per_sample(), factor_B)


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Gradient of an embedding table `[V, D]`: row `id_t` receives `g_t`."""

    ids_BT: Tensor
    grad_BTD: Tensor
    rows: int
    kernel: NormKernel
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
        distinct_R, sums_RD = distinct_sums(self.ids_BT[b], self.grad_BTD[b])
        return Rows(rows_R=distinct_R, gradient_RD=sums_RD)

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm over the distinct tokens of each sample."""
        return self.kernel.sq_norm_lookups(self.ids_BT, self.grad_BTD)

    @property
    def size(self) -> int:
        """Samples B."""
        return len(self.ids_BT)

    def worth_projecting(self, pays: Callable[[int, int, int], bool]) -> bool:
        """Return False: the exact norm visits the distinct tokens alone."""
        return False

    def project(self, probes_BNk: Tensor) -> Projection:
        """Return one table of projected rows per sample."""
        size, width, count = probes_BNk.shape
        values = probes_BNk.new_zeros((size, self.rows, count))
        for b, grad_TD in enumerate(self.grad_BTD):
            values[b].index_add_(0, self.ids_BT[b], grad_TD.to(values.dtype) @ probes_BNk[b])
        norm_BT = torch.linalg.vector_norm(self.grad_BTD, dim=2, dtype=values.dtype)
        terms = self.ids_BT.shape[1] + width
        return Projection(values_BRk=values, size_B=norm_BT.double().sum(1), terms=terms)

    def add_to(self, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · table_b."""
        if sums.sample_by_sample:
            add_each(self, sums, name, factor_B)
        else:
            sums.add_lookups_(name, self.ids_BT, self.grad_BTD, factor_B)


def add_each(part: Contribution, sums: ClippedSum, name: str, factor_B: Tensor) -> None:
    """Add sample by sample; a zero factor drops its sample whatever it is."""
    for b, factor in enumerate(factor_B.unbind(0)):
        if factor.device.type != "cpu" or float(factor) != 0.0:  # a GPU would have to be waited for
            part.sample(b).add_to(sums, name, factor)
