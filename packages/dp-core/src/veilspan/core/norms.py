"""Per-sample arithmetic of a linear map in blocked PyTorch: the default `NormKernel`.

Shape letters: B samples, T tokens, I and O input and output features. Every squared norm is
computed in fp32 or wider and added in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from veilspan.core.gram import GramForm
from veilspan.core.products import compute_dtype, cut_off, operand, products

GRAM_CANCELLATION = 1e-5
"""Below this fraction of (Σ‖a‖‖g‖)² the Gram form has no correct digits left to trust."""

CANCELLING = 4.0
"""Σ‖a‖‖g‖ beyond this times √T times the norm: terms cancel more than those of random tokens."""

ADDED_IN_PLACE = 128
"""Tokens to which a product is added to a sum by the library, which sums as many before it adds."""

_ROWS, _SIGNS = 16, 4  # of a sample, looked at to tell it from another

_CHAIN = 1024  # fp32 sums of squares stay this short; longer chains lose digits of the norm


def sq_norm(values: Tensor) -> Tensor:
    """Return Σ values² as an fp64 scalar, from fp32 chains short enough to keep 6 digits."""
    return sq_norms(values.reshape(1, -1))[0]


def sq_norms(values_Bx: Tensor) -> Tensor:
    """Return Σ values² of each sample, `[B]` fp64; `values_Bx` is `[B, …]`."""
    flat_Bn = values_Bx.reshape(len(values_Bx), -1)
    whole = flat_Bn.shape[1] // _CHAIN * _CHAIN
    if whole == 0:
        return _row_norms(flat_Bn).square()
    chains = flat_Bn[:, :whole].unflatten(1, (whole // _CHAIN, _CHAIN))
    sq_B = _row_norms(chains).square().sum(1)
    if whole < flat_Bn.shape[1]:
        sq_B += _row_norms(flat_Bn[:, whole:]).square()
    return sq_B


def rounding_guard(length: int, dtype: torch.dtype) -> float:
    """Return r such that r·Σ‖a_t‖‖g_t‖ bounds the rounding of a sum of `length` outer products.

    Eight standard deviations of the random-walk model of rounding (Higham and Mary, 2019) for the
    dtype in which the sum is formed.
    """
    return 8.0 * math.sqrt(length) * torch.finfo(compute_dtype(dtype)).eps / 2


def _row_norms(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row, fp64, formed in fp32 or wider."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=compute_dtype(rows.dtype)).double()


def few_numbers(values_Bx: Tensor) -> Tensor:
    """Return what tells each sample's values from others, `[B, n]`: some rows, on a few signs.

    Whole numbers are returned as they are.
    """
    if not values_Bx.is_floating_point():
        return values_Bx.flatten(1).clone()
    rows = values_Bx.detach()
    if rows.ndim > 3:
        rows = rows.flatten(1, -2)
    while rows.ndim < 3:
        rows = rows.unsqueeze(1)
    if rows.shape[1] > _ROWS:
        some = torch.linspace(0, rows.shape[1] - 1, _ROWS, device=rows.device)
        rows = rows[:, some.long()]
    return (rows @ _signs(rows.shape[2], rows.dtype, rows.device)).flatten(1)


@lru_cache(maxsize=64)
def _signs(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return fixed signs, `[width, k]`, of a size at which fp16 overflows for no usual values."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (width, _SIGNS), generator=generator).double() * 2 - 1
    return (signs / math.sqrt(max(1, width))).to(device, dtype)


def distinct_sums(ids_T: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, `[R]`, and the sums of their gradients, `[R, D]` fp32 or fp64.

    To count the distinct ids of a GPU the host would wait for it: there R is T, and rows that are
    left over have the first id and sums of 0.
    """
    if ids_T.device.type == "cpu":
        distinct, place_T = torch.unique(ids_T, return_inverse=True)
    else:
        ordered_T, order_T = torch.sort(ids_T)
        rank_T = (ordered_T.diff(prepend=ordered_T[:1]) != 0).cumsum(0)
        distinct = ordered_T[:1].repeat(len(ids_T)).scatter_(0, rank_T, ordered_T)
        place_T = torch.empty_like(rank_T).scatter_(0, order_T, rank_T)
    wide_TD = grad_TD.to(compute_dtype(grad_TD.dtype))
    sums_RD = wide_TD.new_zeros((len(distinct), grad_TD.shape[1]))
    return distinct, sums_RD.index_add_(0, place_T, wide_TD)


def magnitudes(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64: what the norm would be without cancellation."""
    sizes_B = act_BTI.new_zeros(len(act_BTI), dtype=torch.float64)
    for act, grad in zip(act_BTI.split(_CHAIN, dim=1), grad_BTO.split(_CHAIN, dim=1), strict=True):
        sizes_B += torch.linalg.vecdot(_row_norms(act), _row_norms(grad))
    return sizes_B


def _add_weighted_(total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor) -> None:
    """Add Σ_b factor_b · G_bᵀA_b as one product; the factor meets the smaller operand."""
    dtype = compute_dtype(grad_BTO.dtype)
    act, grad, factors = act_BTI.to(dtype), grad_BTO.to(dtype), factor_B.to(dtype)[:, None, None]
    if act.shape[2] < grad.shape[2]:
        act = act * factors
    else:
        grad = grad * factors
    grads_On, acts_nI = grad.flatten(0, 1).mT, act.flatten(0, 1)
    if total_OI.dtype == dtype and act.shape[1] <= ADDED_IN_PLACE:
        total_OI.addmm_(grads_On, acts_nI)  # no product in memory
    else:
        total_OI += torch.mm(grads_On, acts_nI)


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
    _gram: GramForm = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_gram", GramForm(self.block_elements))

    def sq_norm_direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ‖GᵀA‖² and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64, in blocks of output rows."""
        size_B = magnitudes(act_BTI, grad_BTO)
        guard_B = rounding_guard(act_BTI.shape[1], act_BTI.dtype) * size_B
        return self._direct(act_BTI, grad_BTO) + guard_B.square(), size_B

    def sq_norm_gram(self, act_BTI: Tensor, grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """Return ⟨AAᵀ, GGᵀ⟩ and Σ_t ‖a_t‖‖g_t‖ per sample, `[B]` fp64.

        Over half of the token-by-token tiles.

        Source: Goodfellow (2015), https://arxiv.org/abs/1510.01799; Li et al. (2022),
        https://arxiv.org/abs/2110.05679.
        """
        sq_B, size_B = self._gram.sums(act_BTI, grad_BTO, compute_dtype(grad_BTO.dtype))
        # A GPU waits here, once for a map; `TritonKernel` of veilspan-kernels has a way around.
        hidden_B = sq_B < GRAM_CANCELLATION * size_B.square()
        if bool(hidden_B.any()):
            sq_B = sq_B.clone()
            sq_B[hidden_B] = self._direct(act_BTI[hidden_B], grad_BTO[hidden_B])
        guard_B = rounding_guard(act_BTI.shape[1], act_BTI.dtype) * size_B
        return sq_B + guard_B.square(), size_B

    def per_sample_grad(
        self, act_BTI: Tensor, grad_BTO: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Return GᵀA per sample, `[B, O, I]`, in the dtype of `grad_BTO`; written to `out`."""
        act_BTI = act_BTI.to(grad_BTO.dtype)
        if out is not None and out.dtype != grad_BTO.dtype:
            return out.copy_(torch.bmm(grad_BTO.mT, act_BTI))
        return torch.bmm(grad_BTO.mT, act_BTI, out=out)

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

        One product over all samples, except for samples whose terms cancel: each of those is added
        on its own, so that the rounding of its large terms meets no other sample. What is left of
        the rounding is below that of an fp32 sum of contributions of norm `clip_norm`. On a GPU,
        which would be waited for to know them, each sample is.
        """
        if total_OI.device.type != "cpu":
            self._add_each_(total_OI, act_BTI, grad_BTO, factor_B.to(total_OI.dtype))
            return
        if size_B is None:
            size_B = magnitudes(act_BTI, grad_BTO)
        steady_B = size_B * factor_B <= CANCELLING * math.sqrt(act_BTI.shape[1]) * clip_norm
        if bool(steady_B.all()):  # false where a factor of zero meets what is not finite
            _add_weighted_(total_OI, act_BTI, grad_BTO, factor_B)
            return
        steady_B &= factor_B != 0.0
        if bool(steady_B.any()):
            _add_weighted_(total_OI, act_BTI[steady_B], grad_BTO[steady_B], factor_B[steady_B])
        dtype = compute_dtype(grad_BTO.dtype)
        for b in ((factor_B != 0.0) & ~steady_B).nonzero().flatten().tolist():
            product = grad_BTO[b].mT.to(dtype) @ act_BTI[b].to(dtype)
            total_OI.add_(product, alpha=float(factor_B[b]))

    def normalisation_backward(
        self, x_BTD: Tensor, gain_D: Tensor, grad_BTD: Tensor, *, eps: float, centred: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `y = x̂ · gain`: of x, and of the gain per sample, `[B, D]`.

        Source: Ba et al. (2016), https://arxiv.org/abs/1607.06450; Zhang and Sennrich (2019),
        https://arxiv.org/abs/1910.07467.
        """
        dtype = compute_dtype(torch.promote_types(x_BTD.dtype, grad_BTD.dtype))
        rows, gain_D, grad_BTD = x_BTD.to(dtype), gain_D.to(dtype), grad_BTD.to(dtype)
        if centred:
            rows = rows - rows.mean(-1, keepdim=True)
        width = rows.shape[-1]
        size_BT1 = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale_BT1 = size_BT1.square_().div_(width).add_(eps).rsqrt_()
        unit = rows * scale_BT1
        product = grad_BTD * unit
        through_BT1 = torch.mv(product.flatten(0, 1), gain_D).view(scale_BT1.shape).div_(-width)
        grad_x = grad_BTD * gain_D
        if centred:
            grad_x -= grad_x.mean(-1, keepdim=True)
        grad_x.addcmul_(unit, through_BT1).mul_(scale_BT1)
        return grad_x.to(x_BTD.dtype), product.sum(1)

    def sq_norm_lookups(self, ids_BT: Tensor, grad_BTD: Tensor) -> Tensor:
        """Return the squared norm over the distinct ids of each sample, `[B]` fp64."""
        guard = rounding_guard(ids_BT.shape[1], grad_BTD.dtype)
        sq_B = grad_BTD.new_zeros(len(ids_BT), dtype=torch.float64)
        for b, (ids_T, grad_TD) in enumerate(zip(ids_BT, grad_BTD, strict=True)):
            size = _row_norms(grad_TD).sum()
            sq_B[b] = sq_norm(distinct_sums(ids_T, grad_TD)[1]) + (guard * size).square()
        return sq_B

    def add_lookups_(
        self, total_VD: Tensor, ids_BT: Tensor, grad_BTD: Tensor, factor_B: Tensor
    ) -> None:
        """Add Σ_b factor_b · g_bt to row id_bt of the total, a sample at a time."""
        if total_VD.device.type != "cpu":
            for ids_T, grad_TD, factor in zip(ids_BT, grad_BTD, factor_B, strict=True):
                rows, sums_RD = distinct_sums(ids_T, grad_TD)
                part = torch.where(factor == 0.0, 0.0, sums_RD.to(total_VD.dtype) * factor)
                total_VD.index_add_(0, rows, part)
            return
        for b, factor in enumerate(factor_B.tolist()):
            if factor != 0.0:
                rows, sums_RD = distinct_sums(ids_BT[b], grad_BTD[b])
                total_VD.index_add_(0, rows, sums_RD.to(total_VD.dtype), alpha=factor)

    def add_weighted_(self, total: Tensor, grad_Bx: Tensor, factor_B: Tensor) -> None:
        """Add Σ_b factor_b · grad_b to the total, on a CPU in one sweep over it."""
        if grad_Bx.device.type != "cpu":  # one product might be rounded to TF32
            for gradient, factor in zip(grad_Bx, factor_B.to(total.dtype), strict=True):
                total.addcmul_(torch.where(factor == 0.0, 0.0, gradient), factor)
            return
        if grad_Bx.dtype != total.dtype:
            for gradient, factor in zip(grad_Bx.unbind(0), factor_B.tolist(), strict=True):
                if factor != 0.0:
                    total.add_(gradient, alpha=factor)
            return
        kept_B = factor_B != 0.0
        if not bool(kept_B.all()):
            grad_Bx, factor_B = grad_Bx[kept_B], factor_B[kept_B]
        flat_Bn = grad_Bx.reshape(len(grad_Bx), total.numel())
        total.view(-1).addmv_(flat_Bn.mT, factor_B.to(total.dtype))

    def _add_each_(
        self, total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor
    ) -> None:
        dtype = compute_dtype(grad_BTO.dtype)
        step = max(1, self.block_elements // max(1, act_BTI.shape[2]))
        for total_oI, block_BTo in zip(
            total_OI.split(step), grad_BTO.split(step, dim=2), strict=True
        ):
            for b, factor in enumerate(factor_B.unbind(0)):
                grad, act = block_BTo[b : b + 1], act_BTI[b : b + 1]
                product_oI = products(grad.mT, act, dtype)[0]
                total_oI.addcmul_(torch.where(factor == 0.0, 0.0, product_oI), factor)

    def _direct(self, act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
        dtype = compute_dtype(grad_BTO.dtype)
        batch, _, width = act_BTI.shape
        rows = max(1, self.block_elements // max(1, batch * width))
        sq_B = grad_BTO.new_zeros(batch, dtype=torch.float64)
        shortening = cut_off(act_BTI.shape[1], act_BTI, grad_BTO)
        act_BTI = operand(act_BTI, dtype)
        for block_BTo in grad_BTO.split(rows, dim=2):
            sq_B += _row_norms(products(block_BTo.mT, act_BTI, dtype)).square().sum(1)
        return sq_B * (1.0 + shortening) ** 2
