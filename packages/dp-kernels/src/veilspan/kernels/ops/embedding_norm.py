"""Norms of embedding gradients, without a table per sample.

The gradient's row of token v is the sum of the gradients at all places where v stands. Places are
sorted by token, so every row is a run of places. Runs are added in chunks of fixed length; what
crosses the border of a chunk goes to the next, much shorter level, so one token that fills a whole
sample costs no more than any other. Sums are formed in fp64, which no cancellation can spoil.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from veilspan.kernels.checks import require_dtype, require_ids, require_shape, require_together
from veilspan.kernels.compat import jit, runs_kernels, tl
from veilspan.kernels.launch import Compilation, Configuration, configuration, configurations
from veilspan.kernels.operands import dense_rows, spans
from veilspan.kernels.roofline import Work

__all__ = ["embedding_norm"]

_NOTHING = -1  # token of a place that does not count


def embedding_norm(
    tokens_BT: Tensor, grad_BTD: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Return the squared norm of each sample's gradient of an embedding table.

    Args:
        tokens_BT: `[B, T]`, rows that were looked up, int64 or int32.
        grad_BTD: `[B, T, D]`, gradient of what was looked up.
        padding_idx: Token whose row learns nothing.

    Returns:
        Σ_v ‖Σ_{t: tokens_t = v} g_t‖², `[B]` fp64. It is the same in every run.

    Raises:
        ValueError: If a shape, a dtype, a device or a token does not fit.

    Guarantee:
        Sums over tokens and squares are formed in fp64, so the result is not below the exact one
        by more than T · 2⁻⁵¹ of (Σ_t ‖g_t‖)².

    Examples:
        >>> grad = torch.tensor([[[3.0], [1.0], [2.0]]])
        >>> embedding_norm(torch.tensor([[7, 5, 7]]), grad)
        tensor([26.], dtype=torch.float64)
    """
    require_lookups(tokens_BT, grad_BTD)
    require_ids("tokens_BT", tokens_BT, None, ignore=padding_idx)
    return torch.ops.veilspan.embedding_norm(counted(tokens_BT, padding_idx), grad_BTD.detach())


def work(batch: int, tokens: int, width: int, *, element_bytes: int = 2) -> Work:
    """Return what one call moves: it reads the gradient."""
    return Work(bytes=1.0 * batch * tokens * width * element_bytes)


@jit
@no_type_check
def _place(
    rows,
    order,
    factors,
    at,
    token,
    column,
    tokens,
    width,
    stride_b,
    stride_t,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Return the gradient of one place, fp64; zeros where `token` is none, without reading it."""
    reach = tl.where(token >= 0, width, 0)
    if FIRST:
        place = tl.load(order + at, mask=token >= 0, other=0)
        sample = place // tokens
        source = rows + sample * stride_b + (place % tokens) * stride_t + column
        if SCALED:
            scale = tl.load(factors + sample)
            reach = tl.where(tl.abs(scale) > 0.0, reach, 0)
        row = tl.load(source, mask=column < reach, other=0.0).to(tl.float32).to(tl.float64)
        if SCALED:
            row = row * scale
    else:
        row = tl.load(rows + at * width + column, mask=column < reach, other=0.0)
    return row


@jit
@no_type_check
def _runs_kernel(
    ids,
    order,
    rows,
    factors,
    out,
    crossing,
    carried,
    length,
    chunks,
    tokens,
    width,
    stride_b,
    stride_t,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program serves CHUNK neighbouring places and one block of columns.

    Runs inside the chunk are squared, or added to the total. A run that comes from the chunk before
    is carried in row 0 of the chunk's two, one that goes on to the next in row 1.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    base = (program // chunks) * length
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = chunk * CHUNK
    last = tl.minimum(position + CHUNK, length)
    token = tl.load(ids + base + position)
    before = tl.load(ids + base + position - 1, mask=position > 0, other=-1)
    joined = tl.where(token >= 0, tl.where(before == token, 1, 0), 0)
    row = _place(
        rows, order, factors, base + position, token, column, tokens, width, stride_b, stride_t,
        FIRST, ADD,
    )  # fmt: skip
    run = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for _ in range(CHUNK):
        position += 1
        following = tl.load(ids + base + position, mask=position < length, other=-1)
        run += row
        # Read ahead: the next row is on its way while this one is dealt with.
        row = _place(
            rows, order, factors, base + position, tl.where(position < last, following, -1),
            column, tokens, width, stride_b, stride_t, FIRST, ADD,
        )  # fmt: skip
        ends = tl.where(following != token, 1, 0)
        stops = tl.where(position == last, 1, ends)
        if tl.where(token >= 0, stops, 0) > 0:
            if ends > joined:  # the whole run lies in this chunk
                if ADD:
                    total = out + token * width + column
                    old = tl.load(total, mask=column < width, other=0.0)
                    tl.store(total, old + run.to(tl.float32), mask=column < width)
                else:
                    squares += run * run
            else:
                slot = 2 * program + 1 - joined
                tl.store(carried + slot * width + column, run, mask=column < width)
                tl.store(crossing + slot, token)
                if joined > ends:  # it came and goes on: nothing may part it from what follows
                    nothing = tl.zeros((BLOCK,), tl.float64)
                    tl.store(carried + (slot + 1) * width + column, nothing, mask=column < width)
                    tl.store(crossing + slot + 1, token)
            run = tl.zeros((BLOCK,), tl.float64)
            joined = 0
        token = tl.where(position < last, following, -1)
    if not ADD:
        tl.store(out + program * tl.num_programs(1) + tl.program_id(1), tl.sum(squares))


@torch.library.custom_op("veilspan::embedding_norm", mutates_args=())
def _embedding_norm(tokens_BT: Tensor, grad_BTD: Tensor) -> Tensor:
    if not grad_BTD.numel():
        return grad_BTD.new_zeros(len(grad_BTD), dtype=torch.float64)
    ids_BT, order_BT = torch.sort(tokens_BT.long(), dim=1, stable=True)
    if runs_kernels(grad_BTD):
        start_B = torch.arange(len(ids_BT), device=ids_BT.device) * ids_BT.shape[1]
        return add_runs(ids_BT, order_BT + start_B[:, None], grad_BTD)
    sq_B = grad_BTD.new_zeros(len(grad_BTD), dtype=torch.float64)
    for b, (ids_T, order_T) in enumerate(zip(ids_BT, order_BT, strict=True)):
        for _, _, sums in run_sums(ids_T, order_T, grad_BTD[b : b + 1]):
            sq_B[b] += sums.square().sum()
    return sq_B


@_embedding_norm.register_fake
def _(tokens_BT: Tensor, grad_BTD: Tensor) -> Tensor:
    return grad_BTD.new_empty(len(grad_BTD), dtype=torch.float64)


def add_runs(
    ids_SN: Tensor,
    order_SN: Tensor,
    grad_BTD: Tensor,
    factor_B: Tensor | None = None,
    total_VD: Tensor | None = None,
) -> Tensor:
    """Add runs level by level; return Σ run² of each of S sequences unless there is a total."""
    rows = grad_BTD = dense_rows(grad_BTD)
    sequences, tokens, width = len(ids_SN), *grad_BTD.shape[1:]
    chosen = configuration("embedding_norm", grad_BTD.device)
    blocks = -(-width // chosen.blocks["BLOCK"])
    sq_S = grad_BTD.new_zeros(sequences, dtype=torch.float64)
    while True:
        length = ids_SN.shape[1]
        chunks = -(-length // chosen.blocks["CHUNK"])
        crossing = ids_SN.new_full((sequences, 2 * chunks), _NOTHING)
        carried = sq_S.new_empty((sequences, 2 * chunks if chunks > 1 else 0, width))
        partials = sq_S.new_empty((sequences, chunks * blocks if total_VD is None else 0))
        chosen.launch(
            _runs_kernel,
            (sequences * chunks, blocks),
            ids_SN,
            order_SN,
            rows,
            sq_S if factor_B is None else factor_B,
            partials if total_VD is None else total_VD,
            crossing,
            carried,
            length,
            chunks,
            tokens,
            width,
            *grad_BTD.stride()[:2],
            FIRST=rows is grad_BTD,
            ADD=total_VD is not None,
        )
        sq_S += partials.sum(1)
        if chunks == 1:
            return sq_S
        ids_SN, rows = crossing, carried


def run_sums(
    ids_N: Tensor, order_N: Tensor, grad_BTD: Tensor, factor_B: Tensor | None = None
) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """Yield distinct tokens, some columns, and the sums of the tokens' rows there, in PyTorch."""
    order_N = order_N[ids_N != _NOTHING]
    token_R, length_R = torch.unique_consecutive(ids_N[ids_N != _NOTHING], return_counts=True)
    sample_N = order_N // grad_BTD.shape[1]
    for columns in spans(grad_BTD.shape[2] if len(token_R) else 0, len(order_N)):
        rows = grad_BTD[:, :, columns][sample_N, order_N % grad_BTD.shape[1]].double()
        if factor_B is not None:
            scale_N = factor_B[sample_N][:, None]
            rows = torch.where(scale_N == 0.0, 0.0, rows * scale_N)
        yield token_R, columns, torch.segment_reduce(rows, "sum", lengths=length_R, axis=0)


def counted(tokens_BT: Tensor, padding_idx: int | None) -> Tensor:
    """Return the tokens, with -1 for those whose row learns nothing."""
    return tokens_BT if padding_idx is None else tokens_BT.masked_fill(tokens_BT == padding_idx, -1)


def require_lookups(tokens_BT: Tensor, grad_BTD: Tensor) -> None:
    """Raise unless these are looked up tokens and the gradients of what was looked up."""
    require_together(tokens_BT=tokens_BT, grad_BTD=grad_BTD)
    require_dtype("grad_BTD", grad_BTD)
    require_shape("grad_BTD", grad_BTD, ("B", "T", "D"))
    require_shape("tokens_BT", tokens_BT, grad_BTD.shape[:2])


def compilations(table: str) -> Iterator[Compilation]:
    """Yield what to compile ahead of time for the GPUs of a table."""
    for chosen in configurations("embedding_norm", table):
        yield from compilations_of(chosen, "embedding_norm", add=False)


def compilations_of(chosen: Configuration, name: str, *, add: bool) -> Iterator[Compilation]:
    """Yield the first and the later levels of a sum of runs."""
    for level, first in (("first", True), ("later", False)):
        yield Compilation(
            name=f"{name} {level}",
            kernel=_runs_kernel,
            signature={
                **dict.fromkeys(("ids", "order", "crossing"), "*i64"),
                "rows": "*bf16" if first else "*fp64",
                **dict.fromkeys(("factors", "carried"), "*fp64"),
                "out": "*fp32" if add else "*fp64",
                **dict.fromkeys(("length", "chunks", "tokens", "width"), "i32"),
                **dict.fromkeys(("stride_b", "stride_t"), "i64"),
            },
            constants={"FIRST": first, "ADD": add, **chosen.blocks},
            chosen=chosen,
            odd=("length", "chunks", "tokens"),
        )
