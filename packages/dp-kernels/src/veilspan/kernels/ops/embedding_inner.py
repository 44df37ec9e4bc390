"""Inner products of embedding gradients with the gradients of a head that shares the table.

With E the gradient through the embedding and H that through the head, the norm of a tied table is
‖E‖² + 2⟨E, H⟩ + ‖H‖²; E is never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_ids, require_shape, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, configuration, configurations
from veilspan.kernels.operands import dense_rows, spans
from veilspan.kernels.ops.embedding_norm import counted, require_lookups
from veilspan.kernels.roofline import Work

__all__ = ["embedding_inner"]


def embedding_inner(
    tokens_BT: Tensor, grad_BTD: Tensor, table_BVD: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Return Σ_t ⟨grad_t, table[tokens_t]⟩ of each sample.

    Args:
        tokens_BT: `[B, T]`, rows that were looked up, int64 or int32.
        grad_BTD: `[B, T, D]`, gradient of what was looked up.
        table_BVD: `[B, V, D]`, each sample's gradient of the same table by another use, as
            `fused_head` keeps it.
        padding_idx: Token whose row learns nothing from lookups.

    Returns:
        `[B]` fp64. It is the same in every run.

    Raises:
        ValueError: If a shape, a dtype, a device or a token does not fit.

    Guarantee:
        Products and sums are formed in fp64. Where E and H nearly cancel, ‖E‖² + 2⟨E, H⟩ + ‖H‖²
        keeps the digits that fp64 has beyond ‖E‖² + ‖H‖².

    Examples:
        >>> table = torch.tensor([[[1.0], [10.0]]])
        >>> embedding_inner(torch.tensor([[1, 0]]), torch.tensor([[[2.0], [3.0]]]), table)
        tensor([23.], dtype=torch.float64)
    """
    require_lookups(tokens_BT, grad_BTD)
    require_together(grad_BTD=grad_BTD, table_BVD=table_BVD)
    require_dtype("table_BVD", table_BVD)
    require_shape("table_BVD", table_BVD, (len(grad_BTD), "V", grad_BTD.shape[2]))
    require_ids("tokens_BT", tokens_BT, table_BVD.shape[1], ignore=padding_idx)
    return torch.ops.veilspan.embedding_inner(
        counted(tokens_BT, padding_idx).long(), grad_BTD.detach(), table_BVD.detach()
    )


def work(batch: int, tokens: int, width: int, *, element_bytes: int = 2) -> Work:
    """Return what one call moves: a row of the gradient and one of the table for each token."""
    return Work(bytes=2.0 * batch * tokens * width * element_bytes)


@jit
@no_type_check
def _inner_kernel(
    ids,
    grad,
    table,
    partials,
    tokens,
    width,
    parts,
    grad_stride_b,
    grad_stride_t,
    table_stride_b,
    table_stride_v,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program serves ROWS tokens of one sample, STEPS blocks of columns after another."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // parts
    row = (program % parts) * ROWS + tl.arange(0, ROWS)
    token = tl.load(ids + sample * tokens + row, mask=row < tokens, other=-1)
    counts = (token >= 0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    grad_at = grad + sample * grad_stride_b + row[:, None] * grad_stride_t + column
    table_at = table + sample * table_stride_b + token[:, None] * table_stride_v + column
    sums = tl.zeros((ROWS, BLOCK), tl.float64)
    for _ in range(STEPS):
        one = tl.load(grad_at, mask=counts & (column < width), other=0.0).to(tl.float32)
        two = tl.load(table_at, mask=counts & (column < width), other=0.0).to(tl.float32)
        sums += one.to(tl.float64) * two.to(tl.float64)
        column += BLOCK
        grad_at += BLOCK
        table_at += BLOCK
    tl.store(partials + program, tl.sum(sums))


@torch.library.custom_op("veilspan::embedding_inner", mutates_args=())
def _embedding_inner(tokens_BT: Tensor, grad_BTD: Tensor, table_BVD: Tensor) -> Tensor:
    if grad_BTD.numel() and runs_kernels(grad_BTD) and runs_kernels(table_BVD):
        return _launch(tokens_BT, grad_BTD, table_BVD)
    return _gathered(tokens_BT, grad_BTD, table_BVD)


@_embedding_inner.register_fake
def _(tokens_BT: Tensor, grad_BTD: Tensor, table_BVD: Tensor) -> Tensor:
    return grad_BTD.new_empty(len(grad_BTD), dtype=torch.float64)


def _launch(tokens_BT: Tensor, grad_BTD: Tensor, table_BVD: Tensor) -> Tensor:
    batch, tokens, width = grad_BTD.shape
    grad_BTD, table_BVD = dense_rows(grad_BTD), dense_rows(table_BVD)
    chosen = configuration("embedding_inner", grad_BTD.device)
    parts = -(-tokens // chosen.blocks["ROWS"])
    partials = grad_BTD.new_empty((batch, parts), dtype=torch.float64)
    chosen.launch(
        _inner_kernel,
        (batch * parts,),
        tokens_BT.contiguous(),
        grad_BTD,
        table_BVD,
        partials,
        tokens,
        width,
        parts,
        *grad_BTD.stride()[:2],
        *table_BVD.stride()[:2],
        STEPS=-(-width // chosen.blocks["BLOCK"]),
    )
    return partials.sum(1)


def _gathered(tokens_BT: Tensor, grad_BTD: Tensor, table_BVD: Tensor) -> Tensor:
    """Return what `_launch` returns, in PyTorch, some tokens at a time."""
    batch, tokens, width = grad_BTD.shape
    inner_B = grad_BTD.new_zeros(batch, dtype=torch.float64)
    for b in range(batch):
        for span in spans(tokens, width):
            ids_t = tokens_BT[b, span]
            found_t = ids_t >= 0
            grad_tD = grad_BTD[b, span][found_t].double()
            inner_B[b] += (grad_tD * table_BVD[b][ids_t[found_t]].double()).sum()
    return inner_B


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    strides = ("grad_stride_b", "grad_stride_t", "table_stride_b", "table_stride_v")
    for chosen in configurations("embedding_inner", table):
        yield Compilation(
            name="embedding_inner",
            kernel=_inner_kernel,
            signature={
                "ids": "*i64",
                **dict.fromkeys(("grad", "table"), "*bf16"),
                "partials": "*fp64",
                **dict.fromkeys(("tokens", "width", "parts"), "i32"),
                **dict.fromkeys(strides, "i64"),
            },
            constants={"STEPS": 8, **chosen.blocks},
            chosen=chosen,
            odd=("tokens", "parts"),
        )
