"""‖GᵀA‖² per sample, tile by tile: the gradient of a linear map is formed and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    require_dtype,
    require_linear,
    require_shape,
    require_together,
)
from veilspan.kernels.compat import INTERPRETED, jit, tl
from veilspan.kernels.launch import Compilation, Configuration
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import (
    operands,
    plan,
    product_blocks,
    product_compilations,
    sq_norms,
    tile_count,
    tile_place,
    tile_product,
)

__all__ = ["direct_norm"]


def direct_norm(act_BTI: Tensor, grad_BTO: Tensor, *, wanted_B: Tensor | None = None) -> Tensor:
    """Return the squared Frobenius norm of each sample's weight gradient.

    Args:
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.
        wanted_B: Samples whose norms are asked for, `[B]` bool, on the same device; all by default.
            No host reads it: on a GPU the others cost a launch.

    Returns:
        ‖G_bᵀA_b‖², `[B]` fp64, 0 where it is not wanted. The result is the same in every run on one
        device.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or where PyTorch would multiply
            fp32 operands in TF32.

    Guarantee:
        Products are summed in fp32, in fp64 where an operand is fp64, and nothing is rounded to
        bf16 or TF32. Squares are added in fp32 within a tile and in fp64 between tiles.
        Nothing is added for the rounding of sums that cancel: the caller's slack must cover it.

    Source: Lee and Kifer (2021), https://arxiv.org/abs/2009.03106, form the same product for norms.

    Examples:
        >>> act_BTI = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> direct_norm(act_BTI, torch.ones(2, 1, 3)).round()
        tensor([15., 75.], dtype=torch.float64)
    """
    require_linear(act_BTI, grad_BTO)
    if wanted_B is not None:
        require_together(act_BTI=act_BTI, wanted_B=wanted_B)
        require_dtype("wanted_B", wanted_B, (torch.bool,))
        require_shape("wanted_B", wanted_B, act_BTI.shape[:1])
    return torch.ops.veilspan.direct_norm(act_BTI, grad_BTO, wanted_B)


def work(samples: int, tokens: int, inputs: int, outputs: int, *, operand_bytes: int = 2) -> Work:
    """Return what `direct_norm` computes and moves: one product per sample, its operands read."""
    return Work(
        flops=2.0 * samples * tokens * inputs * outputs,
        bytes=float(samples * tokens * (inputs + outputs) * operand_bytes),
    )


@jit
@no_type_check
def _direct_norm_kernel(
    act,
    grad,
    wanted,
    partials,
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
    SOME: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program squares one tile of one sample, whose operands are not read if not wanted."""
    program = tl.program_id(0)
    tiles = tl.cdiv(outputs, BLOCK_O) * tl.cdiv(inputs, BLOCK_I)
    sample = (program // tiles).to(tl.int64)
    row, column = tile_place(program % tiles, outputs, inputs, BLOCK_O, BLOCK_I, GROUP)
    if SOME:
        tokens = tl.where(tl.load(wanted + sample) != 0, tokens, 0)
    tile = tile_product(
        act + sample * act_sample,
        grad + sample * grad_sample,
        row,
        column,
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
    tl.store(partials + program, tl.sum(tile * tile))


@torch.library.custom_op("veilspan::direct_norm", mutates_args=())
def _direct_norm(act_BTI: Tensor, grad_BTO: Tensor, wanted_B: Tensor | None = None) -> Tensor:
    # The library would form the products of all samples, wanted or not.
    chosen = plan("direct_norm", act_BTI, grad_BTO, any_length=wanted_B is not None)
    if chosen is not None:
        return _launch(act_BTI, grad_BTO, wanted_B, chosen)
    if wanted_B is None:
        return _in_blocks(act_BTI, grad_BTO)
    sq_B = torch.zeros(len(act_BTI), dtype=torch.float64, device=act_BTI.device)
    sq_B[wanted_B] = _in_blocks(act_BTI[wanted_B], grad_BTO[wanted_B])
    return sq_B


@_direct_norm.register_fake
def _(act_BTI: Tensor, grad_BTO: Tensor, wanted_B: Tensor | None = None) -> Tensor:
    return act_BTI.new_empty(act_BTI.shape[0], dtype=torch.float64)


def _launch(
    act_BTI: Tensor, grad_BTO: Tensor, wanted_B: Tensor | None, chosen: Configuration
) -> Tensor:
    act_BTI, grad_BTO = operands(act_BTI, grad_BTO)
    samples, tokens, inputs = act_BTI.shape
    outputs = grad_BTO.shape[2]
    tiles = tile_count(chosen, outputs, inputs)
    partials = torch.empty((samples, tiles), dtype=torch.float32, device=act_BTI.device)
    if partials.numel():
        chosen.launch(
            _direct_norm_kernel,
            (partials.numel(),),
            act_BTI,
            grad_BTO,
            partials if wanted_B is None else wanted_B.contiguous().view(torch.uint8),
            partials,
            tokens,
            outputs,
            inputs,
            *act_BTI.stride()[:2],
            *grad_BTO.stride()[:2],
            SOME=wanted_B is not None,
            UPCAST=INTERPRETED,
        )
    return partials.sum(1, dtype=torch.float64)


def _in_blocks(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Compute the norms in PyTorch, through blocks of products that stay in the cache."""
    sq_B = torch.zeros(len(act_BTI), dtype=torch.float64, device=act_BTI.device)
    for samples, _, block in product_blocks(act_BTI, grad_BTO):
        sq_B[samples] += sq_norms(block)
    return sq_B


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for some in (False, True):
        yield from product_compilations(
            "direct_norm",
            table,
            _direct_norm_kernel,
            {"wanted": "*u8" if some else "*fp32", "partials": "*fp32"},
            constants={"SOME": some},
            variant=" of some" if some else "",
        )
