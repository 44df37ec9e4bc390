"""`total += factor · gradient` over many tensors, with the squared norm of the bits that are added.

The factor is read on the device, so clipping costs no synchronisation. A fixed-point total, int64,
makes sums exact: bitwise the same in every order and sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import (
    FLOATS,
    WIDE,
    require_dtype,
    require_finite,
    require_shape,
    require_together,
    without_tiny,
)
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import UNCAPTURED, Compilation, configuration, configurations
from veilspan.kernels.roofline import Work

__all__ = ["accumulate_", "squared_norm"]

_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
}


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all gradients of one sample together.

    Args:
        gradients: Tensors of fp32, fp16, bf16 or fp64, of any shape, on one device.

    Returns:
        Σ g², fp64, a scalar on the device of the gradients. The result is the same in every run.

    Raises:
        ValueError: If a dtype or a device does not fit.

    Guarantee:
        Squares are formed and added in fp64: the relative error is below 2⁻²⁸ for any length that
        fits into a GPU.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    _check(gradients, "gradients")
    return torch.ops.veilspan.squared_norm(gradients)


def accumulate_(
    totals: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factor: Tensor,
    *,
    grain: float | None = None,
) -> Tensor:
    """Add `factor · gradient` to each total, in place.

    Args:
        totals: Contiguous tensors, all fp32, or all int64 if `grain` is given.
        gradients: Tensors of the shapes of the totals: fp32, fp16, bf16 or fp64.
        factor: Clip factor of this sample, a scalar, fp32 or fp64, on the device of the totals. 0
            adds nothing, even where a gradient is not finite.
        grain: Unit of int64 totals: each contribution is truncated toward zero to a multiple.

    Returns:
        The squared norm of what was added, fp64, a scalar.

    Raises:
        ValueError: If a dtype, a shape, a device or the grain does not fit, or the factor is not
            finite.

    Guarantee:
        A contribution is rounded once, then added; the norm returned is that of these very bits.
        int64 totals add without rounding, and truncation makes no contribution longer.

    Examples:
        >>> total = torch.zeros(3)
        >>> float(accumulate_([total], [torch.tensor([3.0, 4.0, 0.0])], torch.tensor(0.5)))
        6.25
        >>> total
        tensor([1.5000, 2.0000, 0.0000])
    """
    totals, gradients = list(totals), list(gradients)
    _check_totals(totals, gradients, factor, grain)
    if not totals:
        return torch.zeros((), dtype=torch.float64, device=factor.device)
    return torch.ops.veilspan.accumulate_(totals, gradients, factor, grain or 0.0)


def work(elements: int, *, gradient_bytes: int, total_bytes: int = 4) -> Work:
    """Return what `accumulate_` moves: it reads the gradient, and reads and writes the total."""
    return Work(bytes=elements * (gradient_bytes + 2.0 * total_bytes))


@jit
@no_type_check
def _accumulate_kernel(
    table,
    partials,
    factor,
    tensors,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    SEARCH: tl.constexpr,
    GRADIENT: tl.constexpr,
    TOTAL: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program adds BLOCK · STEPS neighbouring elements of one tensor.

    `table` holds the addresses, so one launch serves any number of tensors.
    """
    program = tl.program_id(0).to(tl.int64)
    low = 0
    high = tensors
    for _ in tl.static_range(SEARCH):  # the last tensor that begins at or before this program
        middle = (low + high) // 2
        begun = tl.load(table + 4 * middle + 2) <= program
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    gradient = tl.load(table + 4 * low).to(tl.pointer_type(GRADIENT))
    total = tl.load(table + 4 * low + 1).to(tl.pointer_type(TOTAL))
    length = tl.load(table + 4 * low + 3)
    if ALIGNED:  # else no load could be wider than an element, whose mask may differ from the next
        gradient = tl.multiple_of(gradient, 16)
        total = tl.multiple_of(total, 16)
        length = tl.multiple_of(length, 16)
    index = (program - tl.load(table + 4 * low + 2)) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    scale = tl.load(factor)
    # A factor of 0 drops the sample, finite or not, so nothing of it is even read.
    length = tl.where(tl.abs(scale) > 0.0, length, 0)
    squares = tl.zeros((BLOCK,), tl.float64)
    for _ in range(STEPS):
        inside = index < length
        part = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            old = tl.load(total + index, mask=inside, other=0)
            if TOTAL == tl.int64:
                grains = (part.to(tl.float64) * scale).to(tl.int64)
                tl.store(total + index, old + grains, mask=inside)
                wide = grains.to(tl.float64)
            else:
                part = part * scale.to(tl.float32)
                tl.store(total + index, old + part, mask=inside)
                wide = part.to(tl.float64)
        else:
            wide = part.to(tl.float64)
        squares += wide * wide
        index += BLOCK
    tl.store(partials + program, tl.sum(squares))


@torch.library.custom_op("veilspan::squared_norm", mutates_args=(), tags=UNCAPTURED)
def _squared_norm(gradients: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for alike, _ in _alike(gradients, gradients):
        if runs_kernels(alike[0]):
            total += _launch(alike, alike, torch.ones_like(total), add=False)
        else:
            total += torch.stack([_squared(gradient) for gradient in alike]).sum()
    return total


@_squared_norm.register_fake
def _(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float64)


@torch.library.custom_op("veilspan::accumulate_", mutates_args=("totals",), tags=UNCAPTURED)
def _accumulate(
    totals: list[Tensor], gradients: list[Tensor], factor: Tensor, grain: float
) -> Tensor:
    # Fixed point scales in fp64, where no factor rounds up.
    scale = factor.double() / grain if grain else without_tiny(factor.double())
    added = torch.zeros((), dtype=torch.float64, device=factor.device)
    for alike, theirs in _alike(gradients, totals):
        if runs_kernels(alike[0]) and theirs[0].dtype in _DTYPES:
            added += _launch(alike, theirs, scale, add=True)
        else:
            for total, gradient in zip(theirs, alike, strict=True):
                added += _add(total, gradient, scale)
    return added * grain**2 if grain else added


@_accumulate.register_fake
def _(totals: list[Tensor], gradients: list[Tensor], factor: Tensor, grain: float) -> Tensor:
    return factor.new_empty((), dtype=torch.float64)


def _launch(
    gradients: Sequence[Tensor], totals: Sequence[Tensor], scale: Tensor, *, add: bool
) -> Tensor:
    """Run the kernel over tensors of one dtype; return the squared norm, fp64."""
    gradients = [gradient.contiguous() for gradient in gradients]
    device = scale.device
    chosen = configuration("accumulate", device)
    span = chosen.blocks["BLOCK"] * chosen.blocks["STEPS"]
    table, programs = [], 0
    for gradient, total in zip(gradients, totals, strict=True):
        table.append((gradient.data_ptr(), total.data_ptr(), programs, gradient.numel()))
        programs += -(-gradient.numel() // span)
    aligned = all(number % 16 == 0 for *places, _, length in table for number in (*places, length))
    partials = torch.empty(max(programs, 1), dtype=torch.float64, device=device)
    if programs == 0:
        return partials.zero_().sum()
    chosen.launch(
        _accumulate_kernel,
        (programs,),
        torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True),
        partials,
        scale,
        len(table),
        SEARCH=len(table).bit_length(),
        GRADIENT=getattr(tl, _DTYPES[gradients[0].dtype]),
        TOTAL=getattr(tl, _DTYPES[totals[0].dtype]),
        ADD=add,
        ALIGNED=aligned,
    )
    return partials.sum()


def _add(total: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
    """Add one contribution in PyTorch; return its squared norm, fp64."""
    if total.dtype == torch.int64:
        part = torch.where(scale == 0.0, 0.0, gradient.double() * scale).to(torch.int64)
    else:
        part = torch.where(scale == 0.0, 0.0, gradient.to(total.dtype) * scale.to(total.dtype))
    total += part
    return _squared(part)


def _squared(values: Tensor) -> Tensor:
    return values.double().square().sum()


def _alike(
    gradients: Sequence[Tensor], totals: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield gradients of one dtype with their totals of one dtype; odd lengths slow no others."""
    kinds: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for pair in zip(gradients, totals, strict=True):
        kind = (pair[0].dtype, pair[1].dtype, pair[0].numel() % 16 == 0)
        kinds.setdefault(kind, []).append(pair)
    for chosen in kinds.values():
        yield [gradient for gradient, _ in chosen], [total for _, total in chosen]


def _check(tensors: Sequence[Tensor], argument: str) -> None:
    require_together(**{f"{argument}[{i}]": tensor for i, tensor in enumerate(tensors)})
    for i, tensor in enumerate(tensors):
        require_dtype(f"{argument}[{i}]", tensor, FLOATS)


def _check_totals(
    totals: Sequence[Tensor], gradients: Sequence[Tensor], factor: Tensor, grain: float | None
) -> None:
    if len(totals) != len(gradients):
        raise ValueError(
            f"totals holds {len(totals)} tensors and gradients {len(gradients)}; pass one gradient "
            "for each total."
        )
    if grain is not None and not (math.isfinite(grain) and grain > 0):
        raise ValueError(f"grain is {grain}; it must be finite and above 0.")
    require_dtype("factor", factor, WIDE)
    require_shape("factor", factor, ())
    _check([*gradients], "gradients") if gradients else None
    wide = torch.int64 if grain is not None else torch.float32
    for i, (total, gradient) in enumerate(zip(totals, gradients, strict=True)):
        require_together(factor=factor, **{f"totals[{i}]": total, f"gradients[{i}]": gradient})
        allowed = [wide, torch.float64] if grain is None else [wide]
        require_dtype(f"totals[{i}]", total, allowed)
        require_shape(f"gradients[{i}]", gradient, total.shape)
        if not total.is_contiguous():
            raise ValueError(f"totals[{i}] is not contiguous; pass .contiguous() memory.")
    require_finite("factor", factor)


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("accumulate", table):
        for name, add, total in (
            ("norm", False, "bf16"),
            ("fp32", True, "fp32"),
            ("int64", True, "i64"),
        ):
            yield Compilation(
                name=f"accumulate {name}",
                kernel=_accumulate_kernel,
                signature={
                    "table": "*i64",
                    "partials": "*fp64",
                    "factor": "*fp64",
                    "tensors": "i32",
                },
                constants={
                    "SEARCH": 9,
                    "GRADIENT": tl.bfloat16,
                    "TOTAL": {"bf16": tl.bfloat16, "fp32": tl.float32, "i64": tl.int64}[total],
                    "ADD": add,
                    "ALIGNED": True,
                    **chosen.blocks,
                },
                chosen=chosen,
            )
