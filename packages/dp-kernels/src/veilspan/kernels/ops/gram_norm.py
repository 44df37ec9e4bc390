"""⟨AAᵀ, GGᵀ⟩ per sample: the norm of a gradient from inner products of tokens.

Two small products replace one large one, which pays for short sequences. No token-by-token matrix
is stored, and half of it is never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_linear, require_shape, require_together
from veilspan.kernels.compat import INTERPRETED, jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations
from veilspan.kernels.roofline import Work
from veilspan.kernels.tiles import accumulator, exact_products, has_odd_rows, operands

__all__ = ["gram_inner", "gram_norm"]

SIDE = 256
"""Tokens of a tile in PyTorch."""

_SCRATCH = 1 << 22  # elements of a tile of all samples in PyTorch


def gram_norm(act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return ‖G_bᵀA_b‖² as Σ_{s,t} (a_s·a_t)(g_s·g_t), over half of the pairs of tokens.

    Args:
        act_BTI: Inputs of a linear map: fp32, fp16, bf16 or fp64, of any strides.
        grad_BTO: Gradients at its outputs, on the same device.

    Returns:
        `[B]` fp64; the same in every run on one device. Where terms cancel, rounding can make it
        too small, or negative: it is never clamped, so that the caller sees that and can fall back
        to `direct_norm`.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit, or where PyTorch would multiply
            fp32 operands in TF32.

    Guarantee:
        The error is below a small multiple of 2⁻²⁴·(Σ‖a_t‖‖g_t‖)², whatever the result.

    Source: Goodfellow (2015), https://arxiv.org/abs/1510.01799; Li et al. (2022),
    https://arxiv.org/abs/2110.05679.

    Examples:
        >>> gram_norm(torch.ones(1, 2, 3), torch.ones(1, 2, 4)).round()
        tensor([48.], dtype=torch.float64)
    """
    require_linear(act_BTI, grad_BTO)
    return torch.ops.veilspan.gram(act_BTI, grad_BTO, act_BTI, grad_BTO, True)


def gram_inner(act_BSI: Tensor, grad_BSO: Tensor, act_BTI: Tensor, grad_BTO: Tensor) -> Tensor:
    """Return ⟨G₁ᵀA₁, G₂ᵀA₂⟩ per sample, of two blocks of tokens.

    The norm of a sequence in two parts is that of each part plus twice this.

    Args:
        act_BSI: Inputs of S tokens.
        grad_BSO: Gradients at the outputs of the same tokens.
        act_BTI: Inputs of T other tokens, of the same samples and features.
        grad_BTO: Gradients at their outputs.

    Returns:
        Σ_{s,t} (a_s·a_t)(g_s·g_t), `[B]` fp64; may be negative.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit.
    """
    for suffix, act, grad in (("BSI", act_BSI, grad_BSO), ("BTI", act_BTI, grad_BTO)):
        require_dtype(f"act_{suffix}", act)
        require_dtype(f"grad_{suffix[:2]}O", grad)
    require_together(act_BSI=act_BSI, grad_BSO=grad_BSO, act_BTI=act_BTI, grad_BTO=grad_BTO)
    require_shape("act_BSI", act_BSI, ("B", "S", "I"))
    samples, left, inputs = act_BSI.shape
    require_shape("grad_BSO", grad_BSO, (samples, left, "O"))
    require_shape("act_BTI", act_BTI, (samples, "T", inputs))
    require_shape("grad_BTO", grad_BTO, (samples, act_BTI.shape[1], grad_BSO.shape[2]))
    return torch.ops.veilspan.gram(act_BSI, grad_BSO, act_BTI, grad_BTO, False)


def work(samples: int, tokens: int, inputs: int, outputs: int, *, operand_bytes: int = 2) -> Work:
    """Return what `gram_norm` computes and moves: half of two products of tokens with tokens."""
    return Work(
        flops=float(samples * tokens * (tokens + 1) * (inputs + outputs)),
        bytes=float(samples * tokens * (inputs + outputs) * operand_bytes),
    )


@jit
@no_type_check
def _products(
    left,
    right,
    row,
    column,
    rows,
    columns,
    width,
    left_token,
    right_token,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the inner products of some tokens with some others, summed in fp32."""
    left_token = tl.cast(left_token, tl.int64)
    right_token = tl.cast(right_token, tl.int64)
    these = row * BLOCK_T + tl.arange(0, BLOCK_T)
    those = column * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.arange(0, BLOCK_K)
    lefts = left + these[:, None] * left_token + feature[None, :]
    rights = right + those[None, :] * right_token + feature[:, None]
    tile = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(0, width, BLOCK_K):
        there = feature < width - start
        x = tl.load(lefts, mask=(these[:, None] < rows) & there[None, :], other=0.0)
        y = tl.load(rights, mask=(those[None, :] < columns) & there[:, None], other=0.0)
        if UPCAST:  # the interpreter computes wrongly in bf16; products of bf16 are exact in fp32
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        tile = tl.dot(x, y, tile, input_precision="ieee")  # never TF32
        lefts += BLOCK_K
        rights += BLOCK_K
    return tile


@jit
@no_type_check
def _gram_kernel(
    act_left,
    grad_left,
    act_right,
    grad_right,
    partials,
    rows,
    columns,
    inputs,
    outputs,
    act_left_sample,
    act_left_token,
    grad_left_sample,
    grad_left_token,
    act_right_sample,
    act_right_token,
    grad_right_sample,
    grad_right_token,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program sums one tile of pairs of tokens of one sample."""
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    tile = program % tiles
    if HALF:  # tiles on and below the diagonal: row i holds tiles i(i+1)/2 and on
        row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # the root is rounded
        row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
        column = tile - row * (row + 1) // 2
    else:
        row = tile // tl.cdiv(columns, BLOCK_T)
        column = tile % tl.cdiv(columns, BLOCK_T)
    acts = _products(
        act_left + sample * act_left_sample,
        act_right + sample * act_right_sample,
        row,
        column,
        rows,
        columns,
        inputs,
        act_left_token,
        act_right_token,
        BLOCK_T,
        BLOCK_K,
        UPCAST,
    )
    grads = _products(
        grad_left + sample * grad_left_sample,
        grad_right + sample * grad_right_sample,
        row,
        column,
        rows,
        columns,
        outputs,
        grad_left_token,
        grad_right_token,
        BLOCK_T,
        BLOCK_K,
        UPCAST,
    )
    total = tl.sum(acts * grads)
    if HALF:
        total = tl.where(row == column, total, 2.0 * total)
    tl.store(partials + program, total)


@torch.library.custom_op("veilspan::gram", mutates_args=())
def _gram(
    act_left: Tensor, grad_left: Tensor, act_right: Tensor, grad_right: Tensor, half: bool
) -> Tensor:
    tensors = (act_left, grad_left, act_right, grad_right)
    if all(runs_kernels(tensor) for tensor in tensors):
        return _launch(act_left, grad_left, act_right, grad_right, half=half)
    return _in_tiles(act_left, grad_left, act_right, grad_right, half=half)


@_gram.register_fake
def _(
    act_left: Tensor, grad_left: Tensor, act_right: Tensor, grad_right: Tensor, half: bool
) -> Tensor:
    return act_left.new_empty(act_left.shape[0], dtype=torch.float64)


def _launch(
    act_left: Tensor, grad_left: Tensor, act_right: Tensor, grad_right: Tensor, *, half: bool
) -> Tensor:
    # Inner products join tensors of one kind only, so inputs and gradients may differ in dtype.
    act_left, act_right = operands(act_left, act_right)
    grad_left, grad_right = operands(grad_left, grad_right)
    (samples, rows, inputs), columns = act_left.shape, act_right.shape[1]
    chosen = configuration(
        "gram_norm",
        act_left.device,
        bytes=max(act_left.element_size(), grad_left.element_size()),
        odd=int(any(map(has_odd_rows, (act_left, grad_left, act_right, grad_right)))),
    )
    side = chosen.blocks["BLOCK_T"]
    down, across = -(-rows // side), -(-columns // side)
    tiles = down * (down + 1) // 2 if half else down * across
    partials = torch.empty((samples, tiles), dtype=torch.float32, device=act_left.device)
    if partials.numel():
        chosen.launch(
            _gram_kernel,
            (partials.numel(),),
            act_left,
            grad_left,
            act_right,
            grad_right,
            partials,
            rows,
            columns,
            inputs,
            grad_left.shape[2],
            *act_left.stride()[:2],
            *grad_left.stride()[:2],
            *act_right.stride()[:2],
            *grad_right.stride()[:2],
            tiles,
            HALF=half,
            UPCAST=INTERPRETED,
        )
    return partials.sum(1, dtype=torch.float64)


def _in_tiles(
    act_left: Tensor, grad_left: Tensor, act_right: Tensor, grad_right: Tensor, *, half: bool
) -> Tensor:
    """Compute the sums in PyTorch, a tile of pairs of tokens of all samples at a time."""
    samples = len(act_left)
    total_B = torch.zeros(samples, dtype=torch.float64, device=act_left.device)
    if samples == 0:
        return total_B
    side = max(1, min(SIDE, int((_SCRATCH / samples) ** 0.5)))
    wide = accumulator(act_left, grad_left, act_right, grad_right)
    with exact_products(act_left.device.type, wide):
        for row, (acts, grads) in enumerate(_tiles(act_left, grad_left, side, wide)):
            for column, (others, theirs) in enumerate(_tiles(act_right, grad_right, side, wide)):
                if half and column > row:
                    break
                tile = torch.bmm(acts, others.mT) * torch.bmm(grads, theirs.mT)
                twice = 2.0 if half and column < row else 1.0
                total_B += twice * tile.sum((1, 2), dtype=torch.float64)
    return total_B


def _tiles(
    act_BTI: Tensor, grad_BTO: Tensor, side: int, wide: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    for acts, grads in zip(act_BTI.split(side, 1), grad_BTO.split(side, 1), strict=True):
        yield acts.to(wide), grads.to(wide)


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    kinds = {2: "bf16", 4: "fp32"}
    for chosen in configurations("gram_norm", table):
        dtype = kinds[chosen.up_to.get("bytes", 4)]
        for name, half in (("gram_norm", True), ("gram_inner", False)):
            sides = ("left", "right")
            pointers = [f"{kind}_{side}" for side in sides for kind in ("act", "grad")]
            strides = [f"{pointer}_{axis}" for pointer in pointers for axis in ("sample", "token")]
            tokens, widths = ("tiles", "rows", "columns"), ("inputs", "outputs")
            yield Compilation(
                name=f"{name} {dtype}",
                kernel=_gram_kernel,
                signature={
                    **dict.fromkeys(pointers, f"*{dtype}"),
                    "partials": "*fp32",
                    **dict.fromkeys((*tokens, *widths, *strides), "i32"),
                },
                constants={"HALF": half, "UPCAST": False, **chosen.blocks},
                chosen=chosen,
                odd=tokens if chosen.up_to.get("odd") == 0 else (*tokens, *widths, *strides),
            )
