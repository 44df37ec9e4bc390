"""Σ_b factor_b · G_bᵀA_b as one product over all tokens, with no per-sample gradient in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    require_factors,
    require_linear,
    require_together,
    require_total,
    without_tiny,
)
from veilspan.kernels.compat import INTERPRETED, jit, tl
from veilspan.kernels.launch import Compilation, Configuration
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import (
    accumulator,
    operands,
    plan,
    product_blocks,
    product_compilations,
    tile_count,
    tile_place,
    tile_product,
    used_samples,
)

__all__ = ["clipped_sum"]


def clipped_sum(
    act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, *, total: Tensor | None = None
) -> Tensor:
    """Return the sum over samples of factor times weight gradient.

    Args:
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.
        factor_B: Clip factor of each sample, `[B]` fp32 or fp64. 0 adds nothing, even where the
            operands are not finite.
        total: Where to add the sum, `[O, I]`, contiguous, fp32 or fp64; a new tensor by default.

    Returns:
        `total`, or the sum: fp32, fp64 for fp64 operands. It is the same in every run on one
        device.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, a factor is not finite, or where
            PyTorch would multiply fp32 operands in TF32.

    Guarantee:
        A factor is applied to the fp32 sum over the tokens of its sample, never to an operand: a
        contribution is not rounded to bf16. Samples are added in their order. A kernel reads no
        operand of a sample with factor 0; PyTorch on a GPU may read it, and drops the product.

    Source: Bu et al. (2022), https://arxiv.org/abs/2210.00038, form clipped sums as one product.

    Examples:
        >>> act_BTI = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> clipped_sum(act_BTI, torch.ones(2, 1, 1), torch.tensor([1.0, 0.5]))
        tensor([[2.5000, 4.0000]])
    """
    require_linear(act_BTI, grad_BTO)
    require_together(act_BTI=act_BTI, factor_B=factor_B)
    samples, _, inputs = act_BTI.shape
    outputs = grad_BTO.shape[2]
    require_factors(factor_B, samples)
    add = total is not None
    if total is None:
        dtype = accumulator(act_BTI, grad_BTO)
        total = torch.empty((outputs, inputs), dtype=dtype, device=act_BTI.device)
    else:
        require_together(act_BTI=act_BTI, total=total)
        require_total(total, outputs, inputs)
    torch.ops.veilspan.clipped_sum(act_BTI, grad_BTO, factor_B, total, add)
    return total


def work(
    samples: int,
    tokens: int,
    inputs: int,
    outputs: int,
    *,
    operand_bytes: int = 2,
    add: bool = False,
) -> Work:
    """Return what `clipped_sum` computes and moves: operands are read, the total is written."""
    read = samples * tokens * (inputs + outputs) * operand_bytes
    return Work(
        flops=2.0 * samples * tokens * inputs * outputs,
        bytes=read + inputs * outputs * (8.0 if add else 4.0),
    )


@jit
@no_type_check
def _clipped_sum_kernel(
    act,
    grad,
    factors,
    total,
    samples,
    tokens,
    outputs,
    inputs,
    act_sample,
    act_token,
    grad_sample,
    grad_token,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program sums one tile over all samples."""
    row, column = tile_place(tl.program_id(0), outputs, inputs, BLOCK_O, BLOCK_I, GROUP)
    found = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for _ in range(0, samples):
        factor = tl.load(factors)
        tile = tile_product(
            act,
            grad,
            row,
            column,
            tl.where(tl.abs(factor) > 0.0, tokens, 0),  # nothing of a dropped sample is read
            outputs,
            inputs,
            act_token,
            grad_token,
            BLOCK_O,
            BLOCK_I,
            BLOCK_T,
            UPCAST,
        )
        found += factor * tile
        act += act_sample
        grad += grad_sample
        factors += 1
    output = (row * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    feature = (column * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    there = (output < outputs) & (feature < inputs)
    place = total + output.to(tl.int64) * inputs + feature
    if ADD:
        found += tl.load(place, mask=there, other=0.0)
    tl.store(place, found, mask=there)


@torch.library.custom_op("veilspan::clipped_sum", mutates_args=("total",))
def _clipped_sum(
    act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, total: Tensor, add: bool
) -> None:
    factor_B = without_tiny(factor_B).to(total.dtype).contiguous()
    chosen = plan("clipped_sum", act_BTI, grad_BTO, total)
    if chosen is None:
        _in_blocks(act_BTI, grad_BTO, factor_B, total, add)
    elif total.numel():
        _launch(act_BTI, grad_BTO, factor_B, total, add, chosen)


@_clipped_sum.register_fake
def _(act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, total: Tensor, add: bool) -> None:
    return None


def _launch(
    act_BTI: Tensor,
    grad_BTO: Tensor,
    factor_B: Tensor,
    total: Tensor,
    add: bool,
    chosen: Configuration,
) -> None:
    act_BTI, grad_BTO = operands(act_BTI, grad_BTO)
    outputs, inputs = total.shape
    chosen.launch(
        _clipped_sum_kernel,
        (tile_count(chosen, outputs, inputs),),
        act_BTI,
        grad_BTO,
        factor_B,
        total,
        *act_BTI.shape[:2],
        outputs,
        inputs,
        *act_BTI.stride()[:2],
        *grad_BTO.stride()[:2],
        UPCAST=INTERPRETED,
        ADD=add,
    )


def _in_blocks(
    act_BTI: Tensor, grad_BTO: Tensor, factor_B: Tensor, total: Tensor, add: bool
) -> None:
    """Sum in PyTorch: products per sample in blocks that stay in the cache, then their sum."""
    used = used_samples(factor_B)
    if len(used) < len(factor_B):
        act_BTI, grad_BTO, factor_B = act_BTI[used], grad_BTO[used], factor_B[used]
    if not add:
        total.zero_()
    for samples, rows, block in product_blocks(act_BTI, grad_BTO):
        # Drops a product that is not finite if its factor is 0.
        torch.ops.veilspan.weighted_sum(block, factor_B[samples], total[rows], True)


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for add in (False, True):
        yield from product_compilations(
            "clipped_sum",
            table,
            _clipped_sum_kernel,
            {"factors": "*fp32", "total": "*fp32", "samples": "i32"},
            constants={"ADD": add},
            variant=" added" if add else "",
        )
