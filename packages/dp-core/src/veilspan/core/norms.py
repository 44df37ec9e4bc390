"""Per-sample arithmetic of a linear map in blocked PyTorch: the default `NormKernel`.

Shape letters: B samples, T tokens, I and O input and output features. Every squared norm is
computed in fp32 or wider and added in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_CANCELLATION = 1e-5
"""Below this fraction of (Σ‖a‖‖g‖)² the Gram form has no correct digits left to trust."""

CANCELLING = 4.0
"""Σ‖a‖‖g‖ beyond this times √T times the norm: terms cancel more than those of random tokens."""

_SMALL_TILE, _TILE, _LARGE_TILE = 64, 128, 256  # tokens of a side of a Gram tile
_CHAIN = 1024  # fp32 sums of squares stay this short; longer chains lose digits of the norm


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` values are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sq_norm(values: Tensor) -> Tensor:
    """Return Σ values² as an fp64 scalar, from fp32 chains short enough to keep 6 digits."""
    return sq_norms(values.reshape(1, -1))[0]


def sq_norms(values_Bx: Tensor) -> Tensor:
    """Return Σ values² of each sample, `[B]` fp64; `values_Bx` is `[B, …]`."""
    flat_Bn = values_Bx.reshape(len(values_Bx), -1)
    whole = flat_Bn.shape[1] // _CHAIN * _CHAIN
    chains = flat_Bn[:, :whole].unflatten(1, (whole // _CHAIN, _CHAIN))
    sq_B = _row_norms(chains).square().sum(1)
    return sq_B + _row_norms(flat_Bn[:, whole:]).square()


def gram_tile(length: int) -> int:
    """Return the tokens of a side of a Gram tile: small enough that half of them can be skipped."""
    return min(max(length // 2, _SMALL_TILE), _TILE)


def rounding_guard(length: int, dtype: torch.dtype) -> float:
    """Return r such that r·Σ‖a_t‖‖g_t‖ bounds the rounding of a sum of `length` outer products.

    Eight standard deviations of the random-walk model of rounding (Higham and Mary, 2019) for the
    dtype in which the sum is formed.
    """
    return 8.0 * math.sqrt(length) * torch.finfo(compute_dtype(dtype)).eps / 2


def _row_norms(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row, fp64, formed in fp32 or wider."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=compute_dtype(rows.dtype)).double()


def _diagonal_roots(gram_Btt: Tensor) -> Tensor:
    """Return the norms of the rows that a Gram matrix was made of, `[B, t]` fp64."""
    return gram_Btt.diagonal(dim1=1, dim2=2).double().sqrt()


def magnitudes(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64: what the norm would be without cancellation."""
    sizes_B = act_BTI.new_zeros(len(act_BTI), dtype=torch.float64)
    for act, grad in zip(act_BTI.split(_CHAIN, dim=1), grad_BTO.split(_CHAIN, dim=1), strict=True):
        sizes_B += torch.linalg.vecdot(_row_norms(act), _row_norms(grad))
    return sizes_B


@dataclass(frozen=True, kw_only=True)
class BlockedKernel:
    """Norms and clipped sums whose scratch memory is bounded by a budget.

    Args:
        block_elements: Most elements that any scratch tensor of a norm may hold.

    Guarantee:
        A squared norm is never below that of the exact gradient by more than the documented slack:
        each one carries a guard for the rounding of sums that cancel, and the Gram form falls back
        to the direct form where cancellation hides the norm.
    """

    block_elements: int = 1 << 22

    def sq_norm_direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
        """Return ‖GᵀA‖² per sample, `[B]` fp64, in blocks of output rows."""
        guard_B = rounding_guard(act_BTI.shape[1], act_BTI.dtype) * magnitudes(act_BTI, grad_BTO)
        return self._direct(act_BTI, grad_BTO) + guard_B.square()

    def sq_norm_gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
        """Return ⟨AAᵀ, GGᵀ⟩ per sample, `[B]` fp64, over half of the token-by-token tiles.

        Source: Goodfellow (2015), https://arxiv.org/abs/1510.01799; Li et al. (2022),
        https://arxiv.org/abs/2110.05679.
        """
        sq_B, size_B = self._gram(act_BTI, grad_BTO)
        hidden_B = sq_B < GRAM_CANCELLATION * size_B.square()
        if bool(hidden_B.any()):
            sq_B = sq_B.clone()
            sq_B[hidden_B] = self._direct(act_BTI[hidden_B], grad_BTO[hidden_B])
        guard_B = rounding_guard(act_BTI.shape[1], act_BTI.dtype) * size_B
        return sq_B + guard_B.square()

    def per_sample_grad(
        self, act_BTI: Tensor, grad_BTO: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`, in the dtype of `grad_BTO`; written to `out`."""
        act_BTI = act_BTI.to(grad_BTO.dtype)
        if out is not None and out.dtype != grad_BTO.dtype:
            return out.copy_(torch.bmm(grad_BTO.mT, act_BTI))
        return torch.bmm(grad_BTO.mT, act_BTI, out=out)

    def weighted_grad(
        self, act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, *, clip_norm: float
    ) -> Tensor:
        """Return Σ_b factor_b · G_bᵀA_b, `[O, I]` fp32 or fp64.

        One product over all samples, except for samples whose terms cancel: each of those is summed
        on its own, so that the rounding of its large terms meets no other sample. What is left of
        the rounding is below that of an fp32 sum of contributions of norm `clip_norm`.
        """
        dtype = compute_dtype(grad_BTO.dtype)
        size_B = magnitudes(act_BTI, grad_BTO) * factor_B
        used_B = factor_B != 0.0
        steady_B = used_B & (size_B <= CANCELLING * math.sqrt(act_BTI.shape[1]) * clip_norm)
        if int(steady_B.sum()) > 1:
            act, grad, factors = act_BTI, grad_BTO, factor_B
            if not bool(steady_B.all()):
                act, grad, factors = act_BTI[steady_B], grad_BTO[steady_B], factor_B[steady_B]
            act, grad, factors = act.to(dtype), grad.to(dtype), factors.to(dtype)[:, None, None]
            if act.shape[2] < grad.shape[2]:  # the factor meets the smaller operand
                act = act * factors
            else:
                grad = grad * factors
            total = torch.mm(grad.flatten(0, 1).mT, act.flatten(0, 1))
        else:
            total = grad_BTO.new_zeros((grad_BTO.shape[2], act_BTI.shape[2]), dtype=dtype)
            steady_B = torch.zeros_like(steady_B)
        for b in (used_B & ~steady_B).nonzero().flatten().tolist():
            product = grad_BTO[b].mT.to(dtype) @ act_BTI[b].to(dtype)
            total.add_(product, alpha=float(factor_B[b]))
        return total

    def _direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
        dtype = compute_dtype(grad_BTO.dtype)
        batch, _, width = act_BTI.shape
        rows = max(1, self.block_elements // max(1, batch * width))
        sq_B = grad_BTO.new_zeros(batch, dtype=torch.float64)
        act_BTI = act_BTI.to(dtype)
        for block_BTo in grad_BTO.split(rows, dim=2):
            sq_B += _row_norms(torch.bmm(block_BTo.mT.to(dtype), act_BTI)).square().sum(1)
        return sq_B

    def _gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨AAᵀ, GGᵀ⟩ and Σ_t ‖a_t‖‖g_t‖, of which AAᵀ and GGᵀ hold the squares."""
        dtype = compute_dtype(grad_BTO.dtype)
        batch = act_BTI.shape[0]
        # A GPU would rather start fewer products than skip some of their work.
        best = gram_tile(act_BTI.shape[1]) if act_BTI.device.type == "cpu" else _LARGE_TILE
        side = max(1, min(best, math.isqrt(self.block_elements // max(1, batch))))
        acts = [block.to(dtype) for block in act_BTI.split(side, dim=1)]
        grads = [block.to(dtype) for block in grad_BTO.split(side, dim=1)]
        sq_B, size_B = grad_BTO.new_zeros((2, batch), dtype=torch.float64)
        for i, (act_i, grad_i) in enumerate(zip(acts, grads, strict=True)):
            for j in range(i + 1):
                of_acts, of_grads = torch.bmm(act_i, acts[j].mT), torch.bmm(grad_i, grads[j].mT)
                if i == j:
                    size_B += torch.linalg.vecdot(
                        _diagonal_roots(of_acts), _diagonal_roots(of_grads)
                    )
                tile = of_acts.mul_(of_grads)
                sq_B += (1.0 if i == j else 2.0) * tile.sum((1, 2), dtype=torch.float64)
        return sq_B, size_B
