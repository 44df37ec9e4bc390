"""What one use of a layer adds to the gradient of one parameter, sample by sample.

Each kind answers three questions about the same saved tensors: the per-sample gradient itself, its
squared norm without forming it, or its weighted sum over the samples. Shape letters: B samples, T
tokens, I and O features, V rows of an embedding, D its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from veilspan.core.norms import compute_dtype, rounding_guard, sq_norm, sq_norms
from veilspan.core.protocols import NormKernel

NormChoice = Callable[[int, int, int], str]
"""Norm method, `direct` or `gram`, of a linear map with (tokens, inputs, outputs)."""


class Contribution(Protocol):
    """Per-sample gradient of one parameter, not yet formed."""

    def per_sample(self) -> Tensor:
        """Return the gradient of each sample, `[B, *parameter]`."""
        ...

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm of each sample's gradient, `[B]` fp64."""
        ...

    def weighted(self, factor_B: Tensor) -> Tensor:
        """Return Σ_b factor_b · gradient_b, `[*parameter]`, fp32 or fp64."""
        ...


@dataclass(frozen=True, kw_only=True)
class OuterProducts:
    """Gradient `Σ_t g_t a_tᵀ` of a weight `[O, I]`: linear layers."""

    act_BTI: Tensor
    grad_BTO: Tensor
    kernel: NormKernel

    def per_sample(self) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`."""
        return self.kernel.per_sample_grad(self.act_BTI, self.grad_BTO)

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return ‖GᵀA‖² per sample by the form that `choose` names for this shape."""
        _, length, inputs = self.act_BTI.shape
        gram = choose(length, inputs, self.grad_BTO.shape[2]) == "gram"
        form = self.kernel.sq_norm_gram if gram else self.kernel.sq_norm_direct
        return form(self.act_BTI, self.grad_BTO)

    def weighted(self, factor_B: Tensor) -> Tensor:
        """Return Σ_b factor_b · G_bᵀA_b."""
        return self.kernel.weighted_grad(self.act_BTI, self.grad_BTO, factor_B)


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Gradient `Σ_t r_t` of a vector `[n]`: biases and gains of norms."""

    rows_BTn: Tensor

    def per_sample(self) -> Tensor:
        """Return the sum over tokens, `[B, n]`."""
        dtype = compute_dtype(self.rows_BTn.dtype)
        return self.rows_BTn.sum(1, dtype=dtype)

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm of the sums; `choose` makes no difference to a vector."""
        return sq_norms(self.per_sample())

    def weighted(self, factor_B: Tensor) -> Tensor:
        """Return Σ_b factor_b · Σ_t r_bt from the very sums that the norm was taken of."""
        return weighted_sum(self.per_sample(), factor_B)


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Gradient of an embedding table `[V, D]`: row `id_t` receives `g_t`."""

    ids_BT: Tensor
    grad_BTD: Tensor
    rows: int

    def per_sample(self) -> Tensor:
        """Return one table per sample, `[B, V, D]`."""
        batch, _, width = self.grad_BTD.shape
        table = self.grad_BTD.new_zeros((batch * self.rows, width))
        sample = torch.arange(batch, device=self.ids_BT.device)[:, None] * self.rows
        table.index_add_(0, (self.ids_BT + sample).flatten(), self.grad_BTD.flatten(0, 1))
        return table.view(batch, self.rows, width)

    def sq_norms(self, choose: NormChoice) -> Tensor:
        """Return the squared norm over the distinct tokens of each sample; no `[V, D]` buffer."""
        dtype = compute_dtype(self.grad_BTD.dtype)
        guard = rounding_guard(self.ids_BT.shape[1], dtype)
        sq = []
        for ids_T, grad_TD in zip(self.ids_BT, self.grad_BTD.to(dtype), strict=True):
            distinct, place_T = torch.unique(ids_T, return_inverse=True)
            sums = grad_TD.new_zeros((len(distinct), grad_TD.shape[1]))
            size = torch.linalg.vector_norm(grad_TD, dim=1).double().sum()
            sq.append(sq_norm(sums.index_add_(0, place_T, grad_TD)) + (guard * size).square())
        return torch.stack(sq)

    def weighted(self, factor_B: Tensor) -> Tensor:
        """Return Σ_b factor_b · table_b."""
        dtype = compute_dtype(self.grad_BTD.dtype)
        table = self.grad_BTD.new_zeros((self.rows, self.grad_BTD.shape[2]), dtype=dtype)
        for ids_T, grad_TD, factor in zip(
            self.ids_BT, self.grad_BTD, factor_B.tolist(), strict=True
        ):
            if factor != 0.0:
                table.index_add_(0, ids_T, grad_TD.to(dtype), alpha=factor)
        return table


def weighted_sum(grad_Bx: Tensor, factor_B: Tensor) -> Tensor:
    """Return Σ_b factor_b · grad_b in fp32 or fp64; a zero factor drops its sample whatever it is.

    Args:
        grad_Bx: Per-sample gradients, `[B, …]`.
        factor_B: Factors, `[B]`.

    Returns:
        The weighted sum, `[…]`.
    """
    dtype = compute_dtype(grad_Bx.dtype)
    total = torch.zeros(grad_Bx.shape[1:], dtype=dtype, device=grad_Bx.device)
    for grad, factor in zip(grad_Bx.unbind(0), factor_B.tolist(), strict=True):
        if factor != 0.0:
            total.add_(grad, alpha=factor)
    return total
