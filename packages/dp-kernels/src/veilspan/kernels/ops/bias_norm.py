"""Per-sample gradients of vectors that are added: biases of linear layers.

Tokens are summed first, then the norm is taken: a bound on every token's term would be a bound on
something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_shape, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations
from veilspan.kernels.operands import dense_rows, spans, wide_dtype
from veilspan.kernels.roofline import Work

__all__ = ["bias_norm"]


def bias_norm(grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's gradient of a bias, and its squared norm.

    Args:
        grad_BTO: `[B, T, O]`, gradient of the output of the layer.

    Returns:
        grad_bias_BO: `[B, O]`, fp32 (fp64 for fp64): the sum over tokens.
        sq_norm_B: `[B]` fp64, squared norm of each row of it.

    Raises:
        ValueError: If the shape or the dtype does not fit.

    Guarantee:
        The norm is that of the very numbers in `grad_bias_BO`, squared and added in fp64. It is the
        same in every run.

    Examples:
        >>> bias_norm(torch.tensor([[[1.0, 2.0], [2.0, 2.0]]]))
        (tensor([[3., 4.]]), tensor([25.], dtype=torch.float64))
    """
    require_together(grad_BTO=grad_BTO)
    require_dtype("grad_BTO", grad_BTO)
    require_shape("grad_BTO", grad_BTO, ("B", "T", "O"))
    return torch.ops.veilspan.bias_norm(grad_BTO.detach())


def work(batch: int, tokens: int, width: int, *, element_bytes: int = 2) -> Work:
    """Return what one call moves: it reads the gradient and writes one row per sample."""
    return Work(bytes=batch * width * (tokens * element_bytes + 4.0))


@jit
@no_type_check
def _bias_kernel(
    grad,
    partials,
    tokens,
    width,
    parts,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program adds ROWS · STEPS tokens of one sample in one block of features."""
    program = tl.program_id(0).to(tl.int64)
    row = (program % parts) * (ROWS * STEPS) + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = column < width
    at = grad + (program // parts) * stride_b + row[:, None] * stride_t + column[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(STEPS):
        inside = (row < tokens)[:, None] & wide[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        row += ROWS
        at += ROWS * stride_t
    tl.store(partials + program * width + column, tl.sum(sums, 0), mask=wide)


@torch.library.custom_op("veilspan::bias_norm", mutates_args=())
def _bias_norm(grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
    served = runs_kernels(grad_BTO) and grad_BTO.numel()
    sums_BO = _launch(grad_BTO) if served else _token_sums(grad_BTO)
    sums_BO = sums_BO.to(wide_dtype(grad_BTO))
    return sums_BO, sums_BO.double().square().sum(1)


@_bias_norm.register_fake
def _(grad_BTO: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, width = grad_BTO.shape
    wide = wide_dtype(grad_BTO)
    return (
        grad_BTO.new_empty((batch, width), dtype=wide),
        grad_BTO.new_empty(batch, dtype=torch.float64),
    )


def _launch(grad_BTO: Tensor) -> Tensor:
    batch, tokens, width = grad_BTO.shape
    grad_BTO = dense_rows(grad_BTO)
    chosen = configuration("bias_norm", grad_BTO.device)
    parts = -(-tokens // (chosen.blocks["ROWS"] * chosen.blocks["STEPS"]))
    partials = grad_BTO.new_empty((batch, parts, width), dtype=torch.float32)
    chosen.launch(
        _bias_kernel,
        (batch * parts, -(-width // chosen.blocks["BLOCK"])),
        grad_BTO,
        partials,
        tokens,
        width,
        parts,
        *grad_BTO.stride()[:2],
    )
    return partials.sum(1, dtype=torch.float64)


def _token_sums(grad_BTO: Tensor) -> Tensor:
    """Return what `_launch` returns, in PyTorch, some tokens at a time."""
    batch, tokens, width = grad_BTO.shape
    sums_BO = grad_BTO.new_zeros((batch, width), dtype=torch.float64)
    for span in spans(tokens, batch * width):
        sums_BO += grad_BTO[:, span].sum(1, dtype=torch.float64)
    return sums_BO


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("bias_norm", table):
        yield Compilation(
            name="bias_norm",
            kernel=_bias_kernel,
            signature={
                "grad": "*bf16",
                "partials": "*fp32",
                **dict.fromkeys(("tokens", "width", "parts"), "i32"),
                **dict.fromkeys(("stride_b", "stride_t"), "i64"),
            },
            constants=dict(chosen.blocks),
            chosen=chosen,
            odd=("tokens", "parts"),
        )
