"""Σ_b factor_b · gradient_b over stored per-sample gradients, with factors read on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    require_dtype,
    require_factors,
    require_shape,
    require_together,
    require_total,
    without_tiny,
)
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import accumulator, row_blocks, used_samples

__all__ = ["weighted_sum"]


def weighted_sum(grad_BOI: Tensor, factor_B: Tensor, *, total: Tensor | None = None) -> Tensor:
    """Return the sum over samples of factor times gradient.

    Args:
        grad_BOI: Gradient of each sample: fp32, fp16, bf16 or fp64, of any strides.
        factor_B: Clip factor of each sample, `[B]` fp32 or fp64, on the device of the gradients. 0
            adds nothing, even where a gradient is not finite.
        total: Where to add the sum, `[O, I]`, contiguous, fp32 or fp64; a new tensor by default.

    Returns:
        `total`, or the sum: fp32, fp64 for fp64 gradients. It is the same in every run.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or a factor is not finite.

    Guarantee:
        A gradient times its factor is rounded once to the dtype of the total. These are added in
        the order of the samples, and their sum to the total. Gradients with factor 0 are not read.

    Examples:
        >>> grad_BOI = torch.tensor([[[1.0, 2.0]], [[float("nan"), 4.0]]])
        >>> weighted_sum(grad_BOI, torch.tensor([0.5, 0.0]))
        tensor([[0.5000, 1.0000]])
    """
    require_together(grad_BOI=grad_BOI, factor_B=factor_B)
    require_dtype("grad_BOI", grad_BOI)
    require_shape("grad_BOI", grad_BOI, ("B", "O", "I"))
    samples, outputs, inputs = grad_BOI.shape
    require_factors(factor_B, samples)
    add = total is not None
    if total is None:
        total = torch.empty((outputs, inputs), dtype=accumulator(grad_BOI), device=grad_BOI.device)
    else:
        require_together(grad_BOI=grad_BOI, total=total)
        require_total(total, outputs, inputs)
    torch.ops.veilspan.weighted_sum(grad_BOI, factor_B, total, add)
    return total


def work(samples: int, elements: int, *, gradient_bytes: int = 2, add: bool = False) -> Work:
    """Return what `weighted_sum` moves: gradients are read, the total written, or updated."""
    return Work(bytes=elements * (samples * gradient_bytes + (8.0 if add else 4.0)))


@jit
@no_type_check
def _weighted_sum_kernel(
    grads,
    factors,
    total,
    samples,
    length,
    grad_sample,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program sums BLOCK neighbouring elements over all samples."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    grads += index
    found = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, samples):
        factor = tl.load(factors)
        reach = tl.where(tl.abs(factor) > 0.0, length, 0)  # nothing of a dropped sample is read
        part = tl.load(grads, mask=index < reach, other=0.0).to(tl.float32)
        found += part * factor
        grads += grad_sample
        factors += 1
    if ADD:
        found += tl.load(total + index, mask=inside, other=0.0)
    tl.store(total + index, found, mask=inside)


@torch.library.custom_op("veilspan::weighted_sum", mutates_args=("total",))
def _weighted_sum(grad_BOI: Tensor, factor_B: Tensor, total: Tensor, add: bool) -> None:
    factor_B = without_tiny(factor_B).to(total.dtype).contiguous()
    if runs_kernels(grad_BOI) and runs_kernels(total):
        _launch(grad_BOI, factor_B, total, add)
    else:
        _in_blocks(grad_BOI, factor_B, total, add)


@_weighted_sum.register_fake
def _(grad_BOI: Tensor, factor_B: Tensor, total: Tensor, add: bool) -> None:
    return None


def _launch(grad_BOI: Tensor, factor_B: Tensor, total: Tensor, add: bool) -> None:
    if not grad_BOI[:1].is_contiguous():
        grad_BOI = grad_BOI.contiguous()
    chosen = configuration("weighted_sum", total.device)
    programs = -(-total.numel() // chosen.blocks["BLOCK"])
    if programs:
        chosen.launch(
            _weighted_sum_kernel,
            (programs,),
            grad_BOI,
            factor_B,
            total,
            len(grad_BOI),
            total.numel(),
            grad_BOI.stride(0),
            ADD=add,
        )


def _in_blocks(grad_BOI: Tensor, factor_B: Tensor, total: Tensor, add: bool) -> None:
    """Sum in PyTorch, over all samples for some rows of the total at a time."""
    used = used_samples(factor_B)
    for block in row_blocks(*total.shape):
        found = torch.zeros_like(total[block])
        for b in used:
            part = grad_BOI[b, block].to(total.dtype) * factor_B[b]
            found += torch.where(factor_B[b] == 0.0, 0.0, part)
        total[block] = total[block] + found if add else found


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("weighted_sum", table):
        for dtype, add in (("bf16", True), ("bf16", False), ("fp32", True)):
            yield Compilation(
                name=f"weighted_sum {dtype}{' added' if add else ''}",
                kernel=_weighted_sum_kernel,
                signature={
                    "grads": f"*{dtype}",
                    "factors": "*fp32",
                    "total": "*fp32",
                    "samples": "i32",
                    "length": "i32",
                    "grad_sample": "i32",
                },
                constants={"ADD": add, **chosen.blocks},
                chosen=chosen,
                odd=("samples",),
            )
