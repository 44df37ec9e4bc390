"""Linear head with cross entropy, per-sample gradients included, without the logits of a sample.

Logits exist for some tokens of one sample at a time and become their own gradient in place, by
`cross_entropy_`; the products are the library's. Shape letters: V vocabulary, D features, t tokens
of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    WIDE,
    require_dtype,
    require_ids,
    require_shape,
    require_together,
)
from veilspan.kernels.launch import UNCAPTURED
from veilspan.kernels.operands import wide_dtype
from veilspan.kernels.ops.accumulate import accumulate_
from veilspan.kernels.roofline import Work

__all__ = ["HeadResult", "fused_head"]

_CHUNK_ELEMENTS_HOST = 2**23
_CHUNK_ELEMENTS_DEVICE = 2**29
_CHUNK_TOKENS = 4096  # more tokens do not make the products faster


@dataclass(frozen=True, kw_only=True)
class HeadResult:
    """What `fused_head` returns; all of it is secret.

    Args:
        loss_B: `[B]`, loss of each sample in nats, fp32 (fp64 for fp64).
        grad_hidden_BTD: `[B, T, D]`, gradient of the sum of all losses, not clipped.
        sq_norm_B: `[B]` fp64, squared norm of each sample's gradient of the weight.
        grad_weight_BVD: `[B, V, D]`, these gradients in the dtype of the weight, or None where
            they were not kept.
    """

    loss_B: Tensor
    grad_hidden_BTD: Tensor
    sq_norm_B: Tensor
    grad_weight_BVD: Tensor | None
    _recipe: _Recipe = field(repr=False)

    def add_clipped_(
        self, factor_B: Tensor, total_VD: Tensor, *, grain: float | None = None
    ) -> Tensor:
        """Add Σ_b factor_b · gradient_b of the weight to a total, in place.

        Gradients that were not kept are computed again from the same operands, which must not have
        changed since.

        Args:
            factor_B: `[B]`, clip factors, fp32 or fp64. A sample with factor 0 adds nothing, even
                where its gradient is not finite.
            total_VD: `[V, D]`, contiguous; fp32, or int64 if `grain` is given.
            grain: As in `accumulate_`.

        Returns:
            The squared norm of what each sample added, `[B]` fp64.

        Raises:
            ValueError: If a shape, a dtype, a device or a factor does not fit.
        """
        require_dtype("factor_B", factor_B, WIDE)
        require_shape("factor_B", factor_B, self.loss_B.shape)
        added_B = torch.zeros_like(self.sq_norm_B)
        for b, factor in enumerate(factor_B):
            kept = self.grad_weight_BVD
            gradient = self._recipe.gradient(b) if kept is None else kept[b]
            added_B[b] = accumulate_([total_VD], [gradient], factor, grain=grain)
        return added_B


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Operands of a head, from which its gradients can be formed again."""

    hidden_BTD: Tensor
    weight_VD: Tensor
    target_BT: Tensor
    scale_B: Tensor
    chunk: int

    def gradient(self, b: int) -> Tensor:
        return torch.ops.veilspan.fused_head_gradient(
            self.hidden_BTD[b], self.weight_VD, self.target_BT[b], self.scale_B[b], self.chunk
        )


def fused_head(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    keep_gradient: bool = True,
    reduction: str = "mean",
) -> HeadResult:
    """Return the cross entropy of `hidden · weightᵀ`, with its gradients sample by sample.

    Args:
        hidden_BTD: `[B, T, D]`, input of the head.
        weight_VD: `[V, D]`, its weight, in the dtype of the input.
        labels_BT: `[B, T]`, the token that each position is scored on, or `ignore_index`; int64 or
            int32. They are not shifted.
        ignore_index: Label of positions that do not count; their input is not used.
        chunk: Tokens whose logits exist at the same time; by default as many as keep them below
            2²³ numbers on the CPU, 2²⁹ elsewhere, and at most 4096.
        keep_gradient: Keep the `[B, V, D]` gradients of the weight. Otherwise `add_clipped_` forms
            them again, which costs two more products.
        reduction: `mean` over a sample's own counted tokens, or their `sum`. A mean over the tokens
            of the batch would make a sample's gradient depend on the others.

    Returns:
        Losses, the gradient of the input, norms, and what adds the clipped gradients. A sample
        without counted tokens has loss 0 and gradient 0.

    Raises:
        ValueError: If a shape, a dtype, a device, a label or an option does not fit.

    Guarantee:
        A squared norm is that of the very numbers that `add_clipped_` scales and adds, provided
        that the library's products give equal results for equal operands where they are formed
        twice. No sum reaches over samples, except in the total.

    Examples:
        >>> hidden, weight = torch.zeros(1, 2, 3), torch.zeros(4, 3)
        >>> fused_head(hidden, weight, torch.tensor([[1, -100]])).loss_B
        tensor([1.3863])
    """
    _check(hidden_BTD, weight_VD, labels_BT)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token, or None.")
    require_ids("labels_BT", labels_BT, len(weight_VD), ignore=ignore_index)
    counted_BT = labels_BT != ignore_index
    count_B = counted_BT.sum(1) if reduction == "mean" else counted_BT.any(1)
    recipe = _Recipe(
        hidden_BTD=hidden_BTD.detach(),
        weight_VD=weight_VD.detach(),
        target_BT=labels_BT.long().masked_fill(~counted_BT, -1),
        scale_B=1.0 / count_B.clamp(min=1).to(wide_dtype(hidden_BTD)),
        chunk=chunk or _default_chunk(weight_VD),
    )
    loss_B, grad_hidden_BTD, sq_norm_B, grad_weight_BVD = torch.ops.veilspan.fused_head(
        recipe.hidden_BTD,
        recipe.weight_VD,
        recipe.target_BT,
        recipe.scale_B,
        recipe.chunk,
        keep_gradient,
    )
    return HeadResult(
        loss_B=loss_B,
        grad_hidden_BTD=grad_hidden_BTD,
        sq_norm_B=sq_norm_B,
        grad_weight_BVD=grad_weight_BVD if keep_gradient else None,
        _recipe=recipe,
    )


def work(tokens: int, vocabulary: int, width: int, *, element_bytes: int = 2) -> Work:
    """Return what three products cost; each operand and result is moved once."""
    moved = 2.0 * (tokens + vocabulary) * width * element_bytes
    return Work(flops=6.0 * tokens * vocabulary * width, bytes=moved)


@torch.library.custom_op("veilspan::fused_head", mutates_args=(), tags=UNCAPTURED)
def _fused_head(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    target_BT: Tensor,
    scale_B: Tensor,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = hidden_BTD.shape
    losses_BT = scale_B.new_empty((batch, tokens))
    sq_norm_B = scale_B.new_empty(batch, dtype=torch.float64)
    grad_hidden_BTD = torch.empty_like(hidden_BTD, memory_format=torch.contiguous_format)
    kept = weight_VD.new_empty((batch if keep else 0, *weight_VD.shape))
    wide, one_chunk = wide_dtype(weight_VD), tokens <= chunk
    # A sample of one chunk needs no sum in fp32: its product may be rounded at once.
    direct = keep and (one_chunk or weight_VD.dtype == wide)
    scratch = None if direct else torch.empty_like(weight_VD, dtype=wide)
    for b in range(batch):
        gradient = kept[b] if scratch is None else scratch
        _form(
            gradient,
            (hidden_BTD[b], weight_VD, target_BT[b], scale_B[b]),
            chunk,
            losses_T=losses_BT[b],
            grad_hidden_TD=grad_hidden_BTD[b],
        )
        if keep and scratch is not None:
            gradient = kept[b].copy_(scratch)
        sq_norm_B[b] = torch.ops.veilspan.squared_norm([gradient])
    loss_B = (losses_BT.sum(1, dtype=torch.float64) * scale_B).to(scale_B.dtype)
    return loss_B, grad_hidden_BTD, sq_norm_B, kept


@_fused_head.register_fake
def _(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    target_BT: Tensor,
    scale_B: Tensor,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = len(hidden_BTD)
    return (
        torch.empty_like(scale_B),
        hidden_BTD.new_empty(hidden_BTD.shape),
        scale_B.new_empty(batch, dtype=torch.float64),
        weight_VD.new_empty((batch if keep else 0, *weight_VD.shape)),
    )


@torch.library.custom_op("veilspan::fused_head_gradient", mutates_args=())
def _fused_head_gradient(
    hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: Tensor, chunk: int
) -> Tensor:
    gradient = torch.empty_like(weight_VD, dtype=wide_dtype(weight_VD))
    _form(gradient, (hidden_TD, weight_VD, target_T, scale), chunk)
    return gradient


@_fused_head_gradient.register_fake
def _(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: Tensor, chunk: int) -> Tensor:
    return torch.empty_like(weight_VD, dtype=wide_dtype(weight_VD))


def _form(
    gradient_VD: Tensor,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    chunk: int,
    *,
    losses_T: Tensor | None = None,
    grad_hidden_TD: Tensor | None = None,
) -> None:
    """Write one sample's gradient of the weight; its token losses and input gradient if asked."""
    hidden_TD, weight_VD, target_T, scale = operands
    if not len(hidden_TD):
        gradient_VD.zero_()
    for start in range(0, len(hidden_TD), chunk):
        rows = slice(start, start + chunk)
        # 0 · NaN is NaN: the input of a token that does not count must not reach the product.
        act_tD = hidden_TD[rows].masked_fill((target_T[rows] < 0)[:, None], 0.0)
        slope_tV = torch.mm(act_tD, weight_VD.mT)
        losses_t = torch.ops.veilspan.cross_entropy_(slope_tV, target_T[rows], scale)
        if losses_T is not None:
            losses_T[rows] = losses_t
        if grad_hidden_TD is not None:
            torch.mm(slope_tV, weight_VD, out=grad_hidden_TD[rows])
        _add_product_(gradient_VD, slope_tV.mT, act_tD, first=start == 0)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add `left · right` to the total, or write it there, with sums in the total's dtype."""
    beta = 0 if first else 1
    if total.is_cuda and total.dtype != left.dtype:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, beta=beta, out=total)
    else:
        left, right = left.to(total.dtype), right.to(total.dtype)
        torch.addmm(total, left, right, beta=beta, out=total)


def _default_chunk(weight_VD: Tensor) -> int:
    on_host = weight_VD.device.type == "cpu"
    elements = _CHUNK_ELEMENTS_HOST if on_host else _CHUNK_ELEMENTS_DEVICE
    return max(1, min(_CHUNK_TOKENS, elements // max(1, len(weight_VD))))


def _check(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> None:
    require_together(hidden_BTD=hidden_BTD, weight_VD=weight_VD, labels_BT=labels_BT)
    require_dtype("hidden_BTD", hidden_BTD)
    require_dtype("weight_VD", weight_VD, [hidden_BTD.dtype])
    require_shape("hidden_BTD", hidden_BTD, ("B", "T", "D"))
    require_shape("weight_VD", weight_VD, ("V", hidden_BTD.shape[2]))
    require_shape("labels_BT", labels_BT, hidden_BTD.shape[:2])
    if not len(weight_VD):
        raise ValueError("weight_VD has no rows; a vocabulary has at least one token.")
