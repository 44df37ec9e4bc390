"""The kernels as one object that fits the `NormKernel` seam of veilspan.core.

The ops return what they compute; this object adds what makes a norm safe to clip by: a guard for
the rounding of sums that cancel, and the fall back from the Gram form where it hides the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from veilspan.kernels.checks import require_linear
from veilspan.kernels.ops.affine_norm import layer_norm_backward, rms_norm_backward
from veilspan.kernels.ops.clipped_sum import clipped_sum
from veilspan.kernels.ops.direct_norm import direct_norm
from veilspan.kernels.ops.embedding_norm import embedding_norm
from veilspan.kernels.ops.embedding_sum import embedding_sum_
from veilspan.kernels.ops.gram_norm import gram_norm
from veilspan.kernels.ops.per_sample_grad import per_sample_grad
from veilspan.kernels.ops.weighted_sum import weighted_sum

__all__ = ["GRAM_CANCELLATION", "TritonKernel"]

GRAM_CANCELLATION = 1e-5
"""Below this fraction of (Σ‖a‖‖g‖)² the Gram form has no correct digits left to trust."""


@final
@dataclass(frozen=True)
class TritonKernel:
    """Per-sample arithmetic of a private step in Triton, or PyTorch where Triton is not.

    Shape letters: B samples, T tokens, I and O input and output features.

    Guarantee:
        A squared norm is never below that of the exact gradient by more than a relative 2⁻¹⁸: each
        carries a guard for the rounding of sums that cancel, and one for what tensor cores cut off
        products of 16-bit operands, and the Gram form falls back to the direct form where
        cancellation hides the norm.

    Examples:
        >>> act_BTI, grad_BTO = torch.ones(1, 2, 3), torch.ones(1, 2, 4)
        >>> sq_norm_B, size_B = TritonKernel().sq_norm_direct(act_BTI, grad_BTO)
        >>> sq_norm_B.round()
        tensor([48.], dtype=torch.float64)
    """

    def sq_norm_direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖GᵀA‖² and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64, without a `[B, O, I]` buffer."""
        act_BTI = _alike(act_BTI, grad_BTO)
        size_B = _magnitudes(act_BTI, grad_BTO)
        guard_B = _rounding(act_BTI) * size_B
        return self._direct(act_BTI, grad_BTO) + guard_B.square(), size_B

    def sq_norm_gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨AAᵀ, GGᵀ⟩ and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64, without a `[T, T]` buffer.

        Source: Goodfellow (2015), https://arxiv.org/abs/1510.01799; Li et al. (2022),
        https://arxiv.org/abs/2110.05679.
        """
        act_BTI = _alike(act_BTI, grad_BTO)
        size_B = _magnitudes(act_BTI, grad_BTO)
        sq_B = gram_norm(act_BTI, grad_BTO)
        hidden_B = ~(sq_B >= GRAM_CANCELLATION * size_B.square())  # NaN too
        features = act_BTI.shape[2] + grad_BTO.shape[2]
        sq_B = sq_B * (1.0 + _cut_off(features, act_BTI))
        if act_BTI.device.type != "cpu" or bool(hidden_B.any()):  # a GPU would be waited for
            sq_B = torch.where(hidden_B, self._direct(act_BTI, grad_BTO, hidden_B), sq_B)
        return sq_B + (_rounding(act_BTI) * size_B).square(), size_B

    def per_sample_grad(
        self, act_BTI: Tensor, grad_BTO: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`, in the dtype of `grad_BTO`; in `out` if given."""
        return per_sample_grad(_alike(act_BTI, grad_BTO), grad_BTO, out=out)[0]

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

        A factor multiplies the fp32 product of its own sample, so rounding of large terms that
        cancel meets no other sample, whatever `clip_norm` and `size_B` are.

        Raises:
            ValueError: If `clip_norm` is not above 0, a shape, a dtype or a device does not fit,
                the total is not contiguous, a factor is not finite, or where PyTorch would multiply
                fp32 operands in TF32.
        """
        if not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}; it must be above 0.")
        clipped_sum(_alike(act_BTI, grad_BTO), grad_BTO, factor_B, total=total_OI)

    def normalisation_backward(
        self, x_BTD: Tensor, gain_D: Tensor, grad_BTD: Tensor, *, eps: float, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `y = x̂ · gain`: of x, and of the gain per sample, `[B, D]`.

        x̂ is x / √(mean x² + eps), of x less its mean where `centred`.
        """
        if centred:
            grad_x_BTD, grad_gain_BD, _, _ = layer_norm_backward(x_BTD, gain_D, grad_BTD, eps=eps)
        else:
            grad_x_BTD, grad_gain_BD, _ = rms_norm_backward(x_BTD, gain_D, grad_BTD, eps=eps)
        return grad_x_BTD, grad_gain_BD

    def sq_norm_lookups(self, ids_BT: Tensor, grad_BTD: Tensor) -> Tensor:
        """Return the squared norm of each sample's gradient of a table, `[B]` fp64."""
        return embedding_norm(ids_BT, grad_BTD)

    def add_lookups_(
        self, total_VD: Tensor, ids_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor
    ) -> None:
        """Add Σ_b factor_b · g_bt to row id_bt of the total, fp32 or fp64, in place."""
        embedding_sum_(total_VD, ids_BT, grad_BTD, factor_B)

    def add_weighted_(self, total: Tensor, grad_Bx: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · grad_b to the total, fp32 or fp64, in place."""
        rows = total.shape[0] if total.ndim > 1 else 1
        columns = total.numel() // max(rows, 1)
        flat_Brc = grad_Bx.reshape(len(grad_Bx), rows, columns)
        weighted_sum(flat_Brc, factor_B, total=total.view(rows, columns))

    def _direct(self, act_BTI: Tensor, grad_BTO: Tensor, wanted_B: Tensor | None = None) -> Tensor:
        shortening = _cut_off(act_BTI.shape[1], act_BTI)
        return direct_norm(act_BTI, grad_BTO, wanted_B=wanted_B) * (1.0 + shortening) ** 2


def _alike(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return the input in the dtype of the output gradient, as autograd would use it."""
    act_BTI = act_BTI.to(grad_BTO.dtype)
    require_linear(act_BTI, grad_BTO)
    return act_BTI


def _rounding(act_BTI: Tensor) -> float:
    """Return r such that r·Σ‖a_t‖‖g_t‖ bounds the rounding of a sum of T outer products.

    Eight standard deviations of the random-walk model of rounding (Higham and Mary, 2019).
    """
    eps = torch.finfo(torch.float64 if act_BTI.dtype == torch.float64 else torch.float32).eps
    return 8.0 * math.sqrt(act_BTI.shape[1]) * eps / 2


def _cut_off(length: int, operand: Tensor) -> float:
    """Return how much shorter, relatively, tensor cores make a sum of `length` terms.

    They align up to 16 terms to the largest and cut off what lies below 24 bits, toward zero, so
    the loss is no random walk; a term costs less than 2⁻²⁴ of a sum that grows. Only 16-bit
    operands meet them, and the bound holds on every device, so that factors do not depend on it.

    Source: Fasi, Higham, Mikaitis, Pranesh (2021), https://doi.org/10.7717/peerj-cs.330.
    """
    return length * 2.0**-24 if operand.dtype.itemsize == 2 else 0.0


def _magnitudes(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64: what the norm would be without cancellation."""
    return (_row_norms(act_BTI) * _row_norms(grad_BTO)).sum(1)


def _row_norms(rows: Tensor) -> Tensor:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide).double()
