"""Seams where other packages plug in.

The signatures carry only tensors and numbers, so an implementation never imports this package:
it fits by shape (PEP 544). Shape letters: B samples, T tokens held here, I and O input and output
features. A name that ends in `_B` is per-sample and therefore secret.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

from torch import Tensor


@runtime_checkable
class NormKernel(Protocol):
    """Per-sample arithmetic of a linear map `y = x Wᵀ`, given input A and output gradient G.

    And of a row-wise normalisation, of rows looked up in a table, and of gradients that are formed.
    """

    def sq_norm_direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖GᵀA‖² and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]`, without a `[B, O, I]` buffer."""
        ...

    def sq_norm_gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨AAᵀ, GGᵀ⟩ and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]`, without a `[T, T]` buffer."""
        ...

    def per_sample_grad(
        self, act_BTI: Tensor, grad_BTO: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`, in the dtype of `grad_BTO`; in `out` if given."""
        ...

    def add_outer_products_(
        self,
        total_OI: Tensor,
        act_BTI: Tensor,
        grad_BTO: Tensor,
        factor_B: Tensor,
        *,
        clip_norm: float,
        size_B: Tensor | None = None,
    ) -> None:
        """Add Σ_b factor_b · G_bᵀA_b to the total, fp32 or fp64, in place.

        A sample whose factor is zero contributes exactly zero even where its A or G is not finite.
        `clip_norm` bounds factor_b · ‖G_bᵀA_b‖; against Σ_t ‖a_t‖‖g_t‖, `size_B` where a norm has
        found it, that tells how much the terms of a sample cancel.
        """
        ...

    def normalisation_backward(
        self, x_BTD: Tensor, gain_D: Tensor, grad_BTD: Tensor, *, eps: float, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `y = x̂ · gain`: of x, and of the gain per sample, `[B, D]`.

        x̂ is x / √(mean x² + eps), of x less its mean where `centred`. The first is in the dtype of
        `x_BTD`; the second, summed over tokens in fp32 or better, is what is clipped and added.
        """
        ...

    def sq_norm_lookups(self, ids_BT: Tensor, grad_BTD: Tensor) -> Tensor:
        """Return Σ_v ‖Σ_{t: id_t = v} g_t‖² per sample, `[B]`: the norm of a table's gradient."""
        ...

    def add_lookups_(
        self, total_VD: Tensor, ids_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor
    ) -> None:
        """Add Σ_b factor_b · g_bt to row id_bt of the total, fp32 or fp64, in place.

        What one sample adds to a row is summed first. A zero factor drops its sample.
        """
        ...

    def add_weighted_(self, total: Tensor, grad_Bx: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · grad_b to the total, fp32 or fp64, in place.

        A zero factor drops its sample, finite or not.
        """
        ...


@runtime_checkable
class SequenceShards(Protocol):
    """Who holds the rest of each sample and of each parameter."""

    @property
    def degree(self) -> int:
        """Number of ranks that hold one sequence together; 1 when whole sequences are here."""
        ...

    def sum_scalars(self, values: Tensor) -> Tensor:
        """Return `values` (fp64) summed over the ranks that hold one sequence together."""
        ...

    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, or of its gradient, that this rank owns."""
        ...

    def offset(self, parameter: Tensor) -> int:
        """Return the flat index, in the whole parameter, of the first element owned here."""
        ...

    def restore(self, parameter: Tensor, local: Tensor) -> Tensor:
        """Return `local` in the form that `parameter.grad` must have; inverse of `local`."""
        ...


@runtime_checkable
class SplitModel(SequenceShards, Protocol):
    """Shards of a model whose clipped sums ranks can add up: each keeps the part that it owns."""

    @property
    def different_records(self) -> bool:
        """Whether the ranks hold whole sequences of their own, rather than parts of the same ones.

        Then no gradient may be summed over them before it is clipped; else a record's contribution
        is the sum over them.
        """
        ...

    def scatter(self, parameter: Tensor, total: Tensor) -> Callable[[], Tensor]:
        """Begin to sum `total`, the shape of the whole parameter, over the ranks.

        Every rank calls it for the same parameters in the same order. The function returned waits
        for the part owned here.
        """
        ...

    def agree(self, value: int) -> bool:
        """Return whether every rank gave the same value; each must call it."""
        ...


def split_by_record(shards: SequenceShards) -> TypeGuard[SplitModel]:
    """Return whether ranks with different records, whole sequences each, split the model."""
    return isinstance(shards, SplitModel) and shards.different_records


@runtime_checkable
class GradientReduction(Protocol):
    """Sum of clipped sums over replicas, once per logical batch."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor in place over the replicas of the model."""
        ...


@runtime_checkable
class NoiseSource(Protocol):
    """Gaussian noise addressed by (step, tensor name, global offset), never by call order."""

    def add_(self, tensor: Tensor, *, stddev: float, step: int, name: str, offset: int) -> None:
        """Add N(0, stddev²) in place to `tensor`, flat elements `offset…` of tensor `name`."""
        ...
