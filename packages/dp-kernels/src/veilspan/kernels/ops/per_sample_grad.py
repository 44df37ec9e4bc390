"""GᵀA per sample with the squared norms of the bits that are stored, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_linear, require_shape, require_together
from veilspan.kernels.compat import INTERPRETED, jit, tl
from veilspan.kernels.launch import Compilation, Configuration
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import (
    accumulator,
    exact_products,
    operands,
    plan,
    product_blocks,
    product_compilations,
    sq_norms,
    tile_count,
    tile_place,
    tile_product,
)

__all__ = ["per_sample_grad"]


def per_sample_grad(
    act_BTI: Tensor,
    grad_BTO: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weight gradient of each sample and its squared norm.

    Args:
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.
        out: Where to write the gradients, `[B, O, I]`; samples may lie apart, each is contiguous.
        out_dtype: Dtype of the gradients; that of `out`, or else of `grad_BTO`, by default.

    Returns:
        G_bᵀA_b, `[B, O, I]`, and its squared Frobenius norm, `[B]` fp64. Both are the same in every
        run on one device.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or where PyTorch would multiply
            fp32 operands in TF32.

    Guarantee:
        The norm is that of the stored bits, after their rounding to `out_dtype`: squares are added
        in fp32 within a tile and in fp64 between tiles.

    Examples:
        >>> act_BTI = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> grad_BOI, sq_norm_B = per_sample_grad(act_BTI, torch.ones(2, 1, 1))
        >>> grad_BOI.tolist(), sq_norm_B.round().tolist()
        ([[[1.0, 2.0]], [[3.0, 4.0]]], [5.0, 25.0])
    """
    require_linear(act_BTI, grad_BTO)
    samples, _, inputs = act_BTI.shape
    if out is None:
        dtype = out_dtype or grad_BTO.dtype
        out = torch.empty((samples, grad_BTO.shape[2], inputs), dtype=dtype, device=act_BTI.device)
        require_dtype("out_dtype", out)
    else:
        _check_out(out, act_BTI, grad_BTO, out_dtype)
    return out, torch.ops.veilspan.per_sample_grad(act_BTI, grad_BTO, out)


def work(
    samples: int,
    tokens: int,
    inputs: int,
    outputs: int,
    *,
    operand_bytes: int = 2,
    stored_bytes: int = 2,
) -> Work:
    """Return what `per_sample_grad` computes and moves: operands are read, gradients written."""
    read = samples * tokens * (inputs + outputs) * operand_bytes
    return Work(
        flops=2.0 * samples * tokens * inputs * outputs,
        bytes=float(read + samples * inputs * outputs * stored_bytes),
    )


@jit
@no_type_check
def _per_sample_grad_kernel(
    act,
    grad,
    out,
    partials,
    tokens,
    outputs,
    inputs,
    act_sample,
    act_token,
    grad_sample,
    grad_token,
    out_sample,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program stores one tile of one sample and squares what it stored."""
    program = tl.program_id(0)
    tiles = tl.cdiv(outputs, BLOCK_O) * tl.cdiv(inputs, BLOCK_I)
    sample = (program // tiles).to(tl.int64)
    row, column = tile_place(program % tiles, outputs, inputs, BLOCK_O, BLOCK_I, GROUP)
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
    output = (row * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    feature = (column * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    there = (output < outputs) & (feature < inputs)
    stored = tile.to(out.dtype.element_ty)
    place = out + sample * out_sample + output.to(tl.int64) * inputs + feature
    tl.store(place, stored, mask=there)
    kept = stored.to(tl.float32)
    tl.store(partials + program, tl.sum(kept * kept))


@torch.library.custom_op("veilspan::per_sample_grad", mutates_args=("out",))
def _per_sample_grad(act_BTI: Tensor, grad_BTO: Tensor, out: Tensor) -> Tensor:
    chosen = plan("per_sample_grad", act_BTI, grad_BTO, out)
    if chosen is None:
        return _in_blocks(act_BTI, grad_BTO, out)
    return _launch(act_BTI, grad_BTO, out, chosen)


@_per_sample_grad.register_fake
def _(act_BTI: Tensor, grad_BTO: Tensor, out: Tensor) -> Tensor:
    return act_BTI.new_empty(act_BTI.shape[0], dtype=torch.float64)


def _launch(act_BTI: Tensor, grad_BTO: Tensor, out: Tensor, chosen: Configuration) -> Tensor:
    act_BTI, grad_BTO = operands(act_BTI, grad_BTO)
    samples, tokens, inputs = act_BTI.shape
    outputs = grad_BTO.shape[2]
    tiles = tile_count(chosen, outputs, inputs)
    partials = torch.empty((samples, tiles), dtype=torch.float32, device=act_BTI.device)
    if partials.numel():
        chosen.launch(
            _per_sample_grad_kernel,
            (partials.numel(),),
            act_BTI,
            grad_BTO,
            out,
            partials,
            tokens,
            outputs,
            inputs,
            *act_BTI.stride()[:2],
            *grad_BTO.stride()[:2],
            out.stride(0),
            UPCAST=INTERPRETED,
        )
    return partials.sum(1, dtype=torch.float64)


def _in_blocks(act_BTI: Tensor, grad_BTO: Tensor, out: Tensor) -> Tensor:
    """Compute both in PyTorch: the product, then a pass over what was stored."""
    wide, device = accumulator(act_BTI, grad_BTO), out.device.type
    alike = act_BTI.dtype == grad_BTO.dtype == out.dtype
    if alike and (out.dtype == wide or device == "cuda"):
        with exact_products(device, out.dtype):
            torch.bmm(grad_BTO.mT, act_BTI, out=out)
        return sq_norms(out)
    sq_B = torch.zeros(len(out), dtype=torch.float64, device=out.device)
    for samples, outputs, block in product_blocks(act_BTI, grad_BTO):
        stored = block.to(out.dtype)
        out[samples, outputs] = stored
        sq_B[samples] += sq_norms(stored)
    return sq_B


def _check_out(
    out: Tensor, act_BTI: Tensor, grad_BTO: Tensor, out_dtype: torch.dtype | None
) -> None:
    samples, _, inputs = act_BTI.shape
    outputs = grad_BTO.shape[2]
    require_together(act_BTI=act_BTI, out=out)
    require_dtype("out", out)
    require_shape("out", out, (samples, outputs, inputs))
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(f"out is {out.dtype} and out_dtype {out_dtype}; leave out_dtype away.")
    apart = samples < 2 or out.stride(0) >= outputs * inputs
    if not (apart and out[:1].is_contiguous()):
        raise ValueError("out does not hold one contiguous matrix after the other for its samples.")


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for out in ("bf16", "fp32"):
        yield from product_compilations(
            "per_sample_grad",
            table,
            _per_sample_grad_kernel,
            {"out": f"*{out}", "partials": "*fp32", "out_sample": "i32"},
            variant=f" to {out}",
        )
