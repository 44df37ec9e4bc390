"""Backward passes of RMSNorm and LayerNorm with per-sample gradients of what they learn.

One pass over the input and the output gradient yields the gradient of the input and each sample's
gradients of gain and shift. Tokens are summed first, then the norm is taken: a bound on every
token's term, as in some published kernels, would be a bound on something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_shape, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations, rows
from veilspan.kernels.operands import dense_rows, spans, wide_dtype
from veilspan.kernels.roofline import Work

__all__ = ["layer_norm_backward", "rms_norm_backward"]

_WIDEST = 8192  # features whose row a program holds in registers; PyTorch serves wider ones


def rms_norm_backward(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `y = x / rms(x) · (offset + weight)`, the weight's sample by sample.

    Args:
        x_BTD: `[B, T, D]`, input. Where heads are normalised one by one, fold them into T.
        weight_D: `[D]`, gain.
        grad_BTD: `[B, T, D]`, gradient of y.
        eps: Added to the mean square before its root is taken.
        offset: Added to the weight: 1 for Gemma, else 0.

    Returns:
        grad_x_BTD: `[B, T, D]`, in the dtype of `x_BTD`.
        grad_weight_BD: `[B, D]`, fp32 (fp64 where an operand is fp64).
        sq_norm_B: `[B]` fp64, squared norm of each row of `grad_weight_BD`.

    Raises:
        ValueError: If a shape, a dtype, a device, eps or offset does not fit.

    Guarantee:
        The norm is that of the very numbers in `grad_weight_BD`, squared and added in fp64, and is
        the same in every run.

    Source:
        Zhang and Sennrich (2019), https://arxiv.org/abs/1910.07467.

    Examples:
        >>> x, weight = torch.tensor([[[3.0, 3.0]]]), torch.ones(2)
        >>> rms_norm_backward(x, weight, torch.ones(1, 1, 2), eps=0.0)[1:]
        (tensor([[1., 1.]]), tensor([2.], dtype=torch.float64))
    """
    _check(x_BTD, weight_D, grad_BTD, eps, offset)
    grad_x_BTD, grad_2BD, sq_norm_B = torch.ops.veilspan.affine_norm(
        x_BTD.detach(), weight_D.detach(), grad_BTD.detach(), eps, offset, False
    )
    return grad_x_BTD, grad_2BD[0], sq_norm_B


def layer_norm_backward(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `y = (x - mean) / std · weight + bias`, per sample for the last two.

    Args:
        x_BTD: `[B, T, D]`, input.
        weight_D: `[D]`, gain.
        grad_BTD: `[B, T, D]`, gradient of y.
        eps: Added to the variance before its root is taken.

    Returns:
        grad_x_BTD: `[B, T, D]`, in the dtype of `x_BTD`.
        grad_weight_BD: `[B, D]`, fp32 (fp64 where an operand is fp64).
        grad_bias_BD: `[B, D]`, likewise.
        sq_norm_B: `[B]` fp64, squared norm of each sample's two gradients together.

    Raises:
        ValueError: If a shape, a dtype, a device or eps does not fit.

    Guarantee:
        As of `rms_norm_backward`.

    Source:
        Ba et al. (2016), https://arxiv.org/abs/1607.06450.
    """
    _check(x_BTD, weight_D, grad_BTD, eps, 0.0)
    grad_x_BTD, grad_2BD, sq_norm_B = torch.ops.veilspan.affine_norm(
        x_BTD.detach(), weight_D.detach(), grad_BTD.detach(), eps, 0.0, True
    )
    return grad_x_BTD, grad_2BD[0], grad_2BD[1], sq_norm_B


def work(batch: int, tokens: int, width: int, *, element_bytes: int = 2) -> Work:
    """Return what a backward pass moves: it reads the input and the gradient, and writes one."""
    return Work(bytes=3.0 * batch * tokens * width * element_bytes + 4.0 * batch * width)


@jit
@no_type_check
def _affine_kernel(
    x,
    weight,
    grad,
    grad_x,
    partials,
    eps,
    offset,
    tokens,
    width,
    parts,
    x_stride_b,
    x_stride_t,
    grad_stride_b,
    grad_stride_t,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """One program serves ROWS · STEPS tokens of one sample and writes its share of the sums."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // parts
    row = (program % parts) * (ROWS * STEPS) + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    wide = column < width
    gain = tl.load(weight + column, mask=wide, other=0.0).to(tl.float32) + offset
    gain = tl.where(wide, gain, 0.0)[None, :]
    gain_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(STEPS):
        inside = (row < tokens)[:, None] & wide[None, :]
        x_at = x + sample * x_stride_b + row[:, None] * x_stride_t + column[None, :]
        grad_at = grad + sample * grad_stride_b + row[:, None] * grad_stride_t + column[None, :]
        unit = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            unit = tl.where(inside, unit - (tl.sum(unit, 1) / width)[:, None], 0.0)
        mean = tl.sum(unit * unit, 1) / width + eps
        # Rows beyond the last token hold zeros, whose root may be one of zero.
        scale = tl.where(row < tokens, 1.0 / tl.sqrt(tl.where(row < tokens, mean, 1.0)), 0.0)
        unit = unit * scale[:, None]
        gain_sum += slope * unit
        if CENTRED:
            bias_sum += slope
        slope = slope * gain
        back = slope - unit * (tl.sum(slope * unit, 1) / width)[:, None]
        if CENTRED:
            back = back - (tl.sum(slope, 1) / width)[:, None]
        at = grad_x + (sample * tokens + row[:, None]) * width + column[None, :]
        tl.store(at, (back * scale[:, None]).to(grad_x.dtype.element_ty), mask=inside)
        row += ROWS
    tl.store(partials + program * width + column, tl.sum(gain_sum, 0), mask=wide)
    if CENTRED:
        share = partials + (tl.num_programs(0).to(tl.int64) + program) * width + column
        tl.store(share, tl.sum(bias_sum, 0), mask=wide)


@torch.library.custom_op("veilspan::affine_norm", mutates_args=())
def _affine_norm(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x_BTD, weight_D, grad_BTD)
    served = all(runs_kernels(tensor) for tensor in (x_BTD, weight_D, grad_BTD))
    if served and 0 < x_BTD.shape[2] <= _WIDEST and x_BTD.numel():
        grad_x_BTD, grad_sBD = _launch(x_BTD, weight_D, grad_BTD, eps, offset, centred)
    else:
        grad_x_BTD, grad_sBD = _backward(x_BTD, weight_D, grad_BTD, eps, offset, centred)
    grad_sBD = grad_sBD.to(wide)
    return grad_x_BTD, grad_sBD, grad_sBD.double().square().sum((0, 2))


@_affine_norm.register_fake
def _(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = x_BTD.shape
    wide = wide_dtype(x_BTD, weight_D, grad_BTD)
    return (
        x_BTD.new_empty(x_BTD.shape),
        x_BTD.new_empty((1 + centred, batch, width), dtype=wide),
        x_BTD.new_empty(batch, dtype=torch.float64),
    )


def _launch(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x_BTD.shape
    x_BTD, grad_BTD = dense_rows(x_BTD), dense_rows(grad_BTD)
    chosen = configuration("affine_norm", x_BTD.device, width=width)
    parts = -(-tokens // (chosen.blocks["ROWS"] * chosen.blocks["STEPS"]))
    grad_x_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    partials = x_BTD.new_empty((1 + centred, batch, parts, width), dtype=torch.float32)
    chosen.launch(
        _affine_kernel,
        (batch * parts,),
        x_BTD,
        weight_D.contiguous(),
        grad_BTD,
        grad_x_BTD,
        partials,
        eps,
        offset,
        tokens,
        width,
        parts,
        *x_BTD.stride()[:2],
        *grad_BTD.stride()[:2],
        BLOCK=_covering(width),
        CENTRED=centred,
    )
    return grad_x_BTD, partials.sum(2, dtype=torch.float64)


def _backward(
    x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Return what `_launch` returns, in PyTorch, some tokens at a time."""
    wide = wide_dtype(x_BTD, weight_D, grad_BTD)
    batch, tokens, width = x_BTD.shape
    gain_D = weight_D.to(wide) + offset
    grad_x_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    sums_sBD = x_BTD.new_zeros((1 + centred, batch, width), dtype=torch.float64)
    for span in spans(tokens, batch * width):
        unit, slope = x_BTD[:, span].to(wide), grad_BTD[:, span].to(wide)
        if centred:
            unit = unit - unit.mean(2, keepdim=True)
            sums_sBD[1] += slope.sum(1, dtype=torch.float64)
        scale = (unit.square().mean(2, keepdim=True) + eps).rsqrt()
        unit = unit * scale
        sums_sBD[0] += (slope * unit).sum(1, dtype=torch.float64)
        slope = slope * gain_D
        back = slope - unit * (slope * unit).mean(2, keepdim=True)
        if centred:
            back -= slope.mean(2, keepdim=True)
        grad_x_BTD[:, span] = back * scale
    return grad_x_BTD, sums_sBD


def _covering(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _check(x_BTD: Tensor, weight_D: Tensor, grad_BTD: Tensor, eps: float, offset: float) -> None:
    require_together(x_BTD=x_BTD, weight_D=weight_D, grad_BTD=grad_BTD)
    require_shape("x_BTD", x_BTD, ("B", "T", "D"))
    require_shape("weight_D", weight_D, x_BTD.shape[2:])
    require_shape("grad_BTD", grad_BTD, x_BTD.shape)
    for argument, tensor in (("x_BTD", x_BTD), ("weight_D", weight_D), ("grad_BTD", grad_BTD)):
        require_dtype(argument, tensor)
    if not (math.isfinite(eps) and eps >= 0.0):
        raise ValueError(f"eps is {eps}; it must be finite and not negative.")
    if not math.isfinite(offset):
        raise ValueError(f"offset is {offset}; it must be finite, 0 or 1 as a rule.")


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    places = ("x", "weight", "grad", "grad_x")
    sizes = ("tokens", "width", "parts")
    strides = ("x_stride_b", "x_stride_t", "grad_stride_b", "grad_stride_t")
    for row, chosen in zip(
        rows("affine_norm", table), configurations("affine_norm", table), strict=True
    ):
        for name, centred in (("rms", False), ("layer", True)):
            block = row["up_to"]["width"]
            yield Compilation(
                name=f"affine_norm {name} {block}",
                kernel=_affine_kernel,
                signature={
                    **dict.fromkeys(places, "*bf16"),
                    "partials": "*fp32",
                    **dict.fromkeys(("eps", "offset"), "fp32"),
                    **dict.fromkeys(sizes, "i32"),
                    **dict.fromkeys(strides, "i64"),
                },
                constants={"BLOCK": block, "CENTRED": centred, **chosen.blocks},
                chosen=chosen,
                odd=("tokens", "parts"),
            )
