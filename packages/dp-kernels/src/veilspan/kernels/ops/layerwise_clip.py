"""Norm, clip and sum of one layer in one call: what a layer-wise threshold asks for.

A layer that fits into one tile keeps each sample's gradient on the chip: product, norm and factor
are one kernel, and only the clipped tile is stored. A larger layer goes through a scratch of its
own size, sample by sample: product, norm, scaled sum. Tiles of a large layer that wait for each
other on the chip would need a cooperative launch, and Llama's layers do not fit on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_linear, require_together, require_total
from veilspan.kernels.compat import INTERPRETED, jit, tl
from veilspan.kernels.launch import UNCAPTURED, Compilation, Configuration
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import (
    operands,
    plan,
    product,
    product_compilations,
    tile_count,
    tile_product,
)

__all__ = ["MARGIN", "layerwise_clip_"]

MARGIN = 2.0**-12
"""What the threshold gives up so that no rounding lifts a contribution above it."""

_TINY = torch.finfo(torch.float32).tiny


def layerwise_clip_(
    total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, *, clip_norm: float
) -> Tensor:
    """Add the clipped weight gradient of every sample to `total_OI`, in place.

    Args:
        total_OI: Where to add, `[O, I]`, contiguous, fp32 or fp64.
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.
        clip_norm: Threshold C of this layer; finite, above 0.

    Returns:
        The factors, `[B]` fp64: min(1, C(1 - 2⁻¹²)/norm), and 0 for a sample whose gradient is not
        finite, or too long for a normal fp32 factor. No host reads them: clipping costs no
        synchronisation.

    Raises:
        ValueError: If a shape, a dtype, a device or the threshold does not fit, or where PyTorch
            would multiply fp32 operands in TF32.

    Guarantee:
        What is added of one sample has a norm below C. The factor follows from the norm of the very
        fp32 numbers that it multiplies, squares summed in fp64; the factor and the products are
        rounded to fp32, which lengthens the result by less than 2⁻²¹, and the margin is 2⁻¹². The
        result is the same in every run on one device; no memory is read before it is written.

    Source: layer-wise clipping as in He et al. (2022), https://arxiv.org/abs/2212.01539.

    Examples:
        >>> total_OI = torch.zeros(1, 2)
        >>> layerwise_clip_(total_OI, torch.ones(1, 1, 2), torch.ones(1, 1, 1), clip_norm=9.0)
        tensor([1.], dtype=torch.float64)
        >>> total_OI
        tensor([[1., 1.]])
    """
    require_linear(act_BTI, grad_BTO)
    require_together(act_BTI=act_BTI, total_OI=total_OI)
    require_total(total_OI, grad_BTO.shape[2], act_BTI.shape[2])
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm is {clip_norm}; it must be finite and above 0.")
    return torch.ops.veilspan.layerwise_clip_(total_OI, act_BTI, grad_BTO, float(clip_norm))


def work(samples: int, tokens: int, inputs: int, outputs: int, *, operand_bytes: int = 2) -> Work:
    """Return what the way through a scratch moves: written, read twice; the total read, written."""
    scratch = 4.0 * inputs * outputs
    read = samples * tokens * (inputs + outputs) * operand_bytes
    return Work(
        flops=2.0 * samples * tokens * inputs * outputs, bytes=read + samples * 5.0 * scratch
    )


@jit
@no_type_check
def _layerwise_clip_kernel(
    act,
    grad,
    clipped,
    factors,
    limit,
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
    UPCAST: tl.constexpr,
    TINY: tl.constexpr,
):
    """One program clips one sample, whose gradient never leaves the chip unclipped."""
    sample = tl.program_id(0).to(tl.int64)
    tile = tile_product(
        act + sample * act_sample,
        grad + sample * grad_sample,
        0,
        0,
        tokens,
        outputs,
        inputs,
        act_token,
        grad_token,
        BLOCK_O,
        BLOCK_I,
        BLOCK_T,
        UPCAST,
    )
    wide = tile.to(tl.float64)
    square = tl.sum(wide * wide)
    norm = tl.sqrt(tl.where(square > 0.0, square, 1.0))
    factor = tl.minimum(tl.load(limit) / norm, 1.0)
    factor = tl.where(square < float("inf"), factor, 0.0)  # NaN too
    factor = tl.where(factor < TINY, 0.0, factor)  # smaller ones could round up in fp32
    factor = tl.where(square == 0.0, 1.0, factor)
    tl.store(factors + sample, factor)
    output = tl.arange(0, BLOCK_O)
    feature = tl.arange(0, BLOCK_I)
    there = (output[:, None] < outputs) & (feature[None, :] < inputs)
    place = sample * outputs * inputs + output[:, None] * inputs + feature[None, :]
    tile = tl.where(square < float("inf"), tile, 0.0)
    tl.store(clipped + place, tile * factor.to(tl.float32), mask=there)


@torch.library.custom_op("veilspan::layerwise_clip_", mutates_args=("total_OI",), tags=UNCAPTURED)
def _layerwise_clip(
    total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, clip_norm: float
) -> Tensor:
    limit = torch.full((), clip_norm * (1.0 - MARGIN), dtype=torch.float64, device=act_BTI.device)
    chosen = plan("layerwise_clip", act_BTI, grad_BTO, total_OI)
    if chosen is not None and tile_count(chosen, *total_OI.shape) == 1:
        return _launch(total_OI, act_BTI, grad_BTO, limit, chosen)
    return _through_scratch(total_OI, act_BTI, grad_BTO, limit)


@_layerwise_clip.register_fake
def _(total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, clip_norm: float) -> Tensor:
    return act_BTI.new_empty(act_BTI.shape[0], dtype=torch.float64)


def _launch(
    total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, limit: Tensor, chosen: Configuration
) -> Tensor:
    act_BTI, grad_BTO = operands(act_BTI, grad_BTO)
    samples, tokens, inputs = act_BTI.shape
    outputs, device = grad_BTO.shape[2], act_BTI.device
    clipped = torch.empty((samples, outputs, inputs), dtype=torch.float32, device=device)
    factor_B = torch.empty(samples, dtype=torch.float64, device=device)
    if samples:
        chosen.launch(
            _layerwise_clip_kernel,
            (samples,),
            act_BTI,
            grad_BTO,
            clipped,
            factor_B,
            limit,
            tokens,
            outputs,
            inputs,
            *act_BTI.stride()[:2],
            *grad_BTO.stride()[:2],
            UPCAST=INTERPRETED,
            TINY=_TINY,
        )
    total_OI += clipped.sum(0)
    return factor_B


def _through_scratch(total_OI: Tensor, act_BTI: Tensor, grad_BTO: Tensor, limit: Tensor) -> Tensor:
    """Clip one sample after the other through a scratch of the layer's size."""
    factor_B = torch.ones(len(act_BTI), dtype=torch.float64, device=act_BTI.device)
    if total_OI.numel() == 0:
        return factor_B
    for b in range(len(act_BTI)):
        scratch = product(act_BTI[b : b + 1], grad_BTO[b : b + 1])
        square = torch.ops.veilspan.squared_norm([scratch])
        factor = (limit / square.sqrt()).clamp(max=1.0)
        factor = torch.where(square.isfinite() & (factor >= _TINY), factor, 0.0)
        torch.ops.veilspan.accumulate_([total_OI], [scratch[0]], factor, 0.0)
        factor_B[b] = factor
    return factor_B


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    yield from product_compilations(
        "layerwise_clip",
        table,
        _layerwise_clip_kernel,
        {"clipped": "*fp32", "factors": "*fp64", "limit": "*fp64"},
        constants={"TINY": _TINY},
    )
